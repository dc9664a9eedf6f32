#include "host/choices.h"

#include <algorithm>
#include <cstdint>

namespace megamoe {

namespace {

// Of its memory, and of each SM; 0: nobody knows.
double bytes_per_microsecond_and_sm(const Device& device) {
  return device.num_sms > 0 ? device.bytes_per_microsecond / device.num_sms : 0.0;
}

int most_routes_per_expert_waiting(const Device& device) {
  const double rate = bytes_per_microsecond_and_sm(device) * 1e-3;
  if (rate <= 0.0) return kMostRoutesPerExpertWaiting;
  return static_cast<int>(std::min<double>(kMostRoutesPerExpertWaiting, kRoutesPerExpertTimesRate / rate));
}

// More time for its weights than for its multiplies.
bool waits_for_memory(const Problem& p, const Device& device) {
  return p.num_routes() <= most_routes_per_expert_waiting(device) * p.num_local_experts;
}

int cluster_ctas(const Problem& p, const Device& device) {
  const bool wanted = p.num_routes() >= kLeastRoutesPerExpertOfClusters * p.num_local_experts;
  // All have to run at the same time, as their waits for each other need.
  return wanted && device.num_ctas % 2 == 0 && device.num_ctas <= 2 * device.num_clusters ? 2 : 1;
}

int64_t gate_up_bytes(const Problem& p) {
  return int64_t{2} * p.num_local_experts * p.intermediate_size * p.hidden_size;
}

int weight_bytes_in_flight(const Device& device) {
  const double wanted = kMicrosecondsInFlight * bytes_per_microsecond_and_sm(device);
  return std::max(kWeightBytesInFlight, static_cast<int>(wanted));
}

}  // namespace

int ctas_of_launch(const LaunchChoice& choice, const Device& device) {
  if (choice.cluster_ctas == 1) return device.num_ctas * choice.ctas_per_sm;
  return std::min(device.num_ctas / 2, device.num_clusters) * 2;
}

LaunchChoice choose(const Problem& p, const Problem& largest, const Device& device, bool has_peers) {
  LaunchChoice choice = {};
  choice.swap_operands = p.swap_operands();
  choice.ctas_per_sm = p.in_halves() ? 2 : 1;
  choice.cluster_ctas = 1;
  choice.weight_bytes_in_flight = weight_bytes_in_flight(device) / choice.ctas_per_sm;
  choice.has_lone_token = choice.swap_operands && choice.ctas_per_sm == 1 && !has_peers && is_decoded(p.format) &&
                          p.num_tokens == 1 && p.top_k <= kLoneTokenRows && p.hidden_size <= kMostColumnsOfLoneToken;
  if (choice.swap_operands) return choice;  // its chunks are too small for the rest
  choice.cluster_ctas = cluster_ctas(p, device);
  choice.assembles_images = largest.assembles_images();
  // With fewer units than SMs nothing hides that rows are found late.
  choice.gathers_rows =
      has_peers ? p.sends_rows() && !choice.assembles_images
                : !is_decoded(p.format) && waits_for_memory(p, device) && p.normal_units() >= device.num_sms;
  choice.activations_stay = waits_for_memory(p, device) && gate_up_bytes(p) <= kMostGateUpBytesBesideActivations;
  return choice;
}

}  // namespace megamoe
