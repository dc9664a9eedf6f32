// What a launch is like. In, a line each: "T k H I E R peers format order sms ctas clusters bytes_per_microsecond".
// Out: whether tokens and weights change places, CTAs of a cluster, whether rows are gathered, whether images are
// assembled, whether activations stay, bytes of weights in flight of a CTA, CTAs of an SM, whether each
// CTA quantises a lone token, CTAs of the launch.
#include <iostream>

#include "host/choices.h"

int main() {
  megamoe::Problem p{};
  megamoe::Device device{};
  bool has_peers = false;
  int format = 0, order = 0;
  while (std::cin >> p.num_tokens >> p.top_k >> p.hidden_size >> p.intermediate_size >> p.num_local_experts >>
         p.num_ranks >> has_peers >> format >> order >> device.num_sms >> device.num_ctas >> device.num_clusters >>
         device.bytes_per_microsecond) {
    p.format = static_cast<megamoe::WeightFormat>(format);
    p.order = static_cast<megamoe::OperandOrder>(order);
    const megamoe::LaunchChoice choice = megamoe::choose(p, p, device, has_peers);
    std::cout << choice.swap_operands << ' ' << choice.cluster_ctas << ' ' << choice.gathers_rows << ' '
              << choice.assembles_images << ' ' << choice.activations_stay << ' ' << choice.weight_bytes_in_flight
              << ' ' << choice.ctas_per_sm << ' ' << choice.has_lone_token << ' '
              << megamoe::ctas_of_launch(choice, device) << '\n';
  }
}
