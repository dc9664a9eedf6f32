// The router's kernel on a CPU: a fiber for each of a CTA's threads. In: lines of a call each, "T E k scoring num_groups
// top_groups sums_two renormalize has_bias", then the bits of T x E logits and E biases. Out: of each token k ids, and k
// bits of weights.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

namespace {

constexpr int kMostThreads = 128;

struct Index {
  unsigned x = 0;
};

// Threads that wait for each other: a warp, or all of them. What they bring is there until the time after the next.
struct Meeting {
  int size = 0, come = 0, time = 0;
  uint32_t brought[2][kMostThreads] = {};
};

struct Cta {
  ucontext_t caller, fibers[kMostThreads];
  std::unique_ptr<char[]> stacks[kMostThreads];
  bool has_ended[kMostThreads] = {};
  int current = 0;
  Meeting all, warps[kMostThreads / 32];
};
Cta* cta = nullptr;

void yield() {
  const int from = cta->current;
  do {
    cta->current = (cta->current + 1) % kMostThreads;
  } while (cta->has_ended[cta->current]);
  if (cta->current != from) swapcontext(&cta->fibers[from], &cta->fibers[cta->current]);
}

// Brings a number, waits for the others, and returns what all of them have brought.
const uint32_t* meet(Meeting* meeting, int place, uint32_t bits) {
  const int time = meeting->time;
  meeting->brought[time % 2][place] = bits;
  if (++meeting->come == meeting->size) {
    meeting->come = 0;
    ++meeting->time;
  }
  while (meeting->time == time) yield();
  return meeting->brought[time % 2];
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What the kernel has of CUDA.
struct {
  Index operator()() const { return {static_cast<unsigned>(cta->current)}; }
} thread_index;
Index blockIdx;
#define threadIdx (thread_index())

Meeting* own_warp() { return &cta->warps[cta->current / 32]; }
int own_lane() { return cta->current % 32; }

void __syncthreads() { meet(&cta->all, cta->current, 0); }
float __shfl_xor_sync(unsigned, float value, int distance) {
  const int lane = own_lane();
  return float_of(meet(own_warp(), lane, bits_of(value))[lane ^ distance]);
}
uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  const uint32_t* const all = meet(own_warp(), own_lane(), value);
  uint32_t largest = 0;
  for (int lane = 0; lane < 32; ++lane) largest = all[lane] > largest ? all[lane] : largest;
  return largest;
}
uint32_t __reduce_min_sync(unsigned, uint32_t value) { return ~__reduce_max_sync(0, ~value); }
float __ldg(const float* address) { return *address; }
uint32_t __float_as_uint(float value) { return bits_of(value); }
uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

}  // namespace

using std::isnan;
#include "router/token_router.cuh"

using namespace megamoe;

namespace {

RouteArguments arguments;
routing::SharedRoute shared;

template <int kValues>
void run_thread() {
  routing::TokenRouter<kValues>(arguments, shared).run();
  cta->has_ended[cta->current] = true;
  for (int i = 0; i < kMostThreads; ++i) {
    if (!cta->has_ended[i]) return yield();
  }
  setcontext(&cta->caller);
}

template <int kValues>
void run_token(int token) {
  static_assert(routing::kThreads == kMostThreads);
  Cta fresh;
  cta = &fresh;
  blockIdx.x = static_cast<unsigned>(token);
  fresh.all.size = kMostThreads;
  for (Meeting& warp : fresh.warps) warp.size = 32;
  for (int i = 0; i < kMostThreads; ++i) {
    constexpr size_t kStackBytes = 1 << 16;
    fresh.stacks[i] = std::make_unique<char[]>(kStackBytes);
    getcontext(&fresh.fibers[i]);
    fresh.fibers[i].uc_stack.ss_sp = fresh.stacks[i].get();
    fresh.fibers[i].uc_stack.ss_size = kStackBytes;
    fresh.fibers[i].uc_link = nullptr;
    makecontext(&fresh.fibers[i], run_thread<kValues>, 0);
  }
  swapcontext(&fresh.caller, &fresh.fibers[0]);
}

std::vector<float> read_floats(std::istream& in, size_t count) {
  std::vector<float> values;
  for (uint32_t bits; values.size() < count && in >> bits;) values.push_back(float_of(bits));
  return values;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    RouteArguments& a = arguments;
    a = {};
    int64_t scoring;
    bool has_bias;
    words >> a.num_tokens >> a.num_experts >> a.top_k >> scoring >> a.num_groups >> a.top_groups >> a.sums_two >>
        a.renormalize >> has_bias;
    a.scoring = static_cast<Scoring>(scoring);
    a.group_size = Divisor(static_cast<uint32_t>(a.num_experts / a.num_groups));
    const std::vector<float> logits = read_floats(words, static_cast<size_t>(a.num_tokens) * a.num_experts);
    const std::vector<float> bias = read_floats(words, has_bias ? a.num_experts : 0);
    std::vector<int32_t> ids(static_cast<size_t>(a.num_tokens) * a.top_k, -1);
    std::vector<float> weights(ids.size());
    a.logits = logits.data();
    a.bias = has_bias ? bias.data() : nullptr;
    a.ids = ids.data();
    a.weights = weights.data();
    for (int token = 0; token < a.num_tokens; ++token) {
      const int values = (a.num_experts + routing::kThreads - 1) / routing::kThreads;
      if (values <= 1) {
        run_token<1>(token);
      } else if (values <= 2) {
        run_token<2>(token);
      } else if (values <= 4) {
        run_token<4>(token);
      } else {
        run_token<8>(token);
      }
    }
    for (size_t i = 0; i < ids.size(); ++i) std::cout << ids[i] << ' ' << bits_of(weights[i]) << ' ';
    std::cout << '\n';
  }
}
