// Every number that a decision about a launch rests on: with its unit, what it decides, and the section of
// docs/performance-log.md that has its measurements. host/choices.h decides with the first half of them; kernels use
// the second half where they go. All were measured on an H100 and an H200: on another GPU, begin here, with
// `scripts/probe crossover` and `build/stream`. What the tensor cores, registers and shared memory dictate is no
// threshold and lies in layout/tiles.h and kernels/roles.h.
#pragma once

namespace megamoe {

// Decided by the host, before the launch.

// swapAB serves calls of up to so many routes per expert, on average. Beyond, the memory does not hide that 56 tokens
// take longer on N than 128 do on M. The normal orientation starts and ends with units twice as large, which matters
// the more the fewer gate/up units it has: hence by its units for each SM. The SMs are those of the GPUs that were
// measured and not the device's own, since the orientation is known where a program is lowered, perhaps without a GPU,
// and is the same on all ranks of a group.
// Unit: routes per expert, below so many units per SM. Measured: "Where swapAB ends".
struct SwapLimit {
  int units_per_sm;
  int routes_per_expert;
};
constexpr int kMeasuredSms = 132;
constexpr SwapLimit kSwapLimits[] = {{1, 46}, {2, 34}, {8, 28}};
constexpr int kLeastSwapLimit = 18;

// swapAB serves so many of weights that are decoded, whatever the number of units.
// Unit: routes per expert. Measured: "Many tokens of MXFP4: a warpgroup that decodes".
constexpr int kMostRoutesPerExpertSwappedDecoded = 47;

// swapAB serves up to so many of weights that are decoded with two CTAs on each SM. With 36 of Flash and 32 of Pro one
// CTA was faster: of more than 40 tokens, experts have two chunks.
// Unit: routes per expert. Measured: "Chunks of 40 tokens".
constexpr int kMostRoutesPerExpertInHalves = 30;

// ... if there are as many gate/up units, with one chunk for each expert, or for each route where these are fewer: else
// the launch is mostly start and end, which take longer with twice as many CTAs.
// Unit: gate/up units. Measured: "Two CTAs on an SM".
constexpr int kLeastUnitsInHalves = 5 * kMeasuredSms / 2;

// One token of weights that are decoded is quantised by each CTA for itself, into shared memory, if it has no more
// columns than that leaves room for seven stages of weights.
// Unit: hidden columns. Measured: "One token: quantised by each CTA".
constexpr int kMostColumnsOfLoneToken = 8192;

// From so many on, CTAs work in clusters of two, which share the weights of experts with two full chunks.
// Unit: routes per expert. Measured: "The producer, and pairs".
constexpr int kLeastRoutesPerExpertOfClusters = 192;

// Weights on their way at any time, at least. About 48 KB per SM saturate the memory; what goes beyond that only
// queues, and every flag, atomic and token of the whole device waits in the same queues.
// Unit: bytes per SM. Measured: "Decode at the memory floor: what taught most".
constexpr int kWeightBytesInFlight = 64 * 1024;

// Faster memories want what they bring in this time, if that is more.
// Unit: microseconds. Measured: "Steps, Flash on an H200".
constexpr double kMicrosecondsInFlight = 2.0;

// Up to so many the normal orientation waits for its weights more than it multiplies: so many on an H100, fewer where
// the memory is faster, in inverse proportion to its rate.
// Unit: routes per expert; routes per expert times kilobytes per microsecond and SM.
// Measured: "Rows, and what stays in the L2".
constexpr int kMostRoutesPerExpertWaiting = 112;
constexpr double kRoutesPerExpertTimesRate = 2850.0;

// Up to so many, activations stay in the L2 where gate/up weights leave it first; with more, they have left before
// their down units come, whatever the L2 is told.
// Unit: bytes of a rank's gate/up weights. Measured: "Rows, and what stays in the L2".
constexpr long long kMostGateUpBytesBesideActivations = 1LL << 30;

// From so many on, a group's images of tokens are put together on the expert's rank while units run, instead of
// written by the token's rank before the first unit. Fewer tokens are there sooner if they are written.
// Unit: routes per expert. Measured: "Images put together while units run".
constexpr int kLeastRoutesPerExpertAssembled = 256;

// Up to so many, a group's tokens go to each rank as a row, and rows are gathered as units need them.
// Unit: routes per expert. Measured: "Rows over the wires".
constexpr int kMostRoutesPerExpertSent = 64;

// Known to the kernels when they are compiled.

// The first stages come one by one: tokens are being dispatched, and their way through the memory matters more.
// Unit: stages. Measured: "Rows, and what stays in the L2".
constexpr int kStagesAtStart = 3;

// Launches of up to so many swapAB gate/up units are mostly start and end, where flags and tokens must not queue behind
// weights: kWeightBytesInFlight, however fast the memory is.
// Unit: gate/up units per CTA. Measured: "Steps, Flash on an H200".
constexpr int kFewUnitsPerCta = 2;

// A CTA whose swapAB ring is full before the first tokens have come brings so much of its first unit into the L2, a
// stage at a time, at about the pace at which the memory serves all SMs.
// Unit: bytes; cycles per stage. Measured: "Expert parallel (2 x H100, NV18)".
constexpr int kMostBytesAheadOfRing = 192 * 1024;
constexpr int kCyclesPerStageAheadOfRing = 1800;

// A CTA that has more of the tokens to dispatch does not ask for its first unit before the weight producer does: the
// tokens would wait behind it.
// Unit: items of kDispatchColumns columns of a token. Measured: "Gather, start and tail".
constexpr int kMostItemsBesidePrefetch = 2;

// The normal orientation's last down units go in the order of columns, which are summed as they complete.
// Unit: down units per CTA. Measured: "Rows, and what stays in the L2".
constexpr int kTailUnitsPerCta = 2;

// From so many on, a warp sums columns far apart of the same tokens as they complete; with fewer, most of the sum comes
// after the last unit anyway, and its share is in one piece.
// Unit: warps per group of tokens. Measured: "Rows, and what stays in the L2".
constexpr int kLeastWarpsPerTokenGroup = 4;

// Up to so many, a step of a swapAB down unit is a whole K block; from 40 on that is a matter of registers, too.
// Unit: tokens of a chunk. Measured: "What a swapAB stage costs".
constexpr int kMostTokensOfWholeSteps = 16;

}  // namespace megamoe
