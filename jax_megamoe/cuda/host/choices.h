// Every decision about a launch, in one pure function of the problem and the device: no CUDA, so that tests ask it on a
// CPU (tests/test_choices.py). The numbers that it goes by are in layout/thresholds.h; instantiations/ does what it
// says.
#pragma once

#include "layout/problem.h"

namespace megamoe {

// What a launch may use of a device.
struct Device {
  int num_sms;
  int num_ctas;      // of the launch, or of each rank in it, if each has its SM alone; one for each but in tests
  int num_clusters;  // of two CTAs that can run at the same time, for each rank of the launch
  double bytes_per_microsecond;  // from its memory; 0: the driver does not say
};

struct LaunchChoice {
  // Tokens and weights change places in the multiply (swapAB).
  bool swap_operands;
  // 2: each has half of the SM's shared memory and registers.
  int ctas_per_sm;
  // 1, or 2 that share the weights of experts with several chunks of tokens.
  int cluster_ctas;
  // Tokens are quantised once and gathered row by row, instead of into the images of all their experts.
  bool gathers_rows;
  // Images of tokens are put together while units run. So that it is the same for all launches of a call, it is the
  // workspace's and not the launch's.
  bool assembles_images;
  // Activations stay in the L2 until they are used: gate/up weights of experts with one chunk leave it first.
  bool activations_stay;
  // Each CTA quantises the only token for itself (kernels/lone_token.cuh).
  bool has_lone_token;
  // Bytes of weights that a CTA has on their way, at most.
  int weight_bytes_in_flight;
};

// CTAs of a launch: as many as the device has, or as many clusters as run at the same time. 0: it has no clusters.
int ctas_of_launch(const LaunchChoice& choice, const Device& device);

// For one launch, of `problem`, whose workspace was made for `largest`, the call's first launch. `has_peers`: other
// ranks write tokens to this one's memory.
LaunchChoice choose(const Problem& problem, const Problem& largest, const Device& device, bool has_peers);

}  // namespace megamoe
