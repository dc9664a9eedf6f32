// Prints what tells this host from others.
#include <iostream>

#include "transport/identity.h"

int main() { std::cout << megamoe::transport::host_identity() << '\n'; }
