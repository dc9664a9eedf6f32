// Streams and communicators of the fakes: host memory for device memory, one thread for each rank.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace fakes {

struct Clique {
  std::mutex mutex;
  std::map<int, std::map<int, std::string>> contributions;  // by step, then rank
  int num_ranks = 0;
};

struct Comm {
  Clique* clique = nullptr;
  int rank = 0, device = 0, step = 0;
  std::vector<void*>* windows = nullptr;  // by rank; null: no windows
};

// A stream runs at once, but for an all-gather, which is over when all ranks have come to it.
struct Stream {
  Clique* clique = nullptr;
  int step = 0;
  char* received = nullptr;
};

}  // namespace fakes
