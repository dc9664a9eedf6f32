// Images of tokens, put together from rows.
//
// A token is quantised once, as a row, by the rank that has it. While units run, a warp of each CTA copies rows into
// the images of their chunks: chunk after chunk in the order of gate/up units, so that the first unit waits for its
// own tokens only. Images go through a ring: a chunk's place is free when the gate/up units of the one before are
// complete. Pieces of eight rows go by ticket, since a CTA may start late. A piece takes the way through shared
// memory, where 16 bytes a lane are swizzled, and a plane's kilobyte leaves it by one copy.
#pragma once

#include <cstdint>

#include "common/ptx/async_copy.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/images.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

// One warp, in a group.
template <typename Orientation, typename Group>
class ImageAssembler {
 public:
  __device__ ImageAssembler(const MoeArguments& args, const SharedMap<Orientation>& map, const Plan& plan)
      : args_(args), counters_(map.counters(args)), plan_(plan), buffer_(map.assembly_buffer()) {}

  __device__ __forceinline__ void run() {
    if (!Group::await_rows(args_)) return;
    const int last = plan_.first_expert() + plan_.num_experts() - 1;
    const int pieces = (plan_.row_base(last) + round_up(plan_.count(last), kPieceRows)) / kPieceRows;
    for (int piece = __shfl_sync(~0u, draw(), 0); piece < pieces;) {
      const int drawn = draw();  // whose answer comes meanwhile
      assemble(piece * kPieceRows);
      piece = __shfl_sync(~0u, drawn, 0);
    }
  }

 private:
  static constexpr int kPieceRows = kAssemblyPieceRows;
  static constexpr int kPlaneBytes = kPieceRows * kBlockK;  // of a piece
  static constexpr int kPlanes = kAssemblyPlanes;           // that are on their way together
  static constexpr int kLanesPerRow = kBlockK / sizeof(uint4);
  static constexpr int kRowsPerCopy = 32 / kLanesPerRow;

  // Lane 0 draws.
  __device__ __forceinline__ int draw() const {
    return threadIdx.x % 32 == 0 ? static_cast<int>(ptx::fetch_add_relaxed(counters_.next_piece(), 1)) : 0;
  }

  // The expert whose images have row `row`; experts without tokens have the same first row as their successor.
  __device__ __forceinline__ int expert_of_row(int row) const {
    int low = 0, high = plan_.num_experts() - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (plan_.row_base(plan_.first_expert() + middle) <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // Until the units of the chunk that had the image's place are complete. These have lower tickets than the units of
  // this one, and wait for pieces with lower tickets only.
  __device__ __forceinline__ void await_slot(int chunk) const {
    const int earlier = chunk - static_cast<int>(args_.constants.image_slots.value());
    if (earlier >= 0) {
      Group::wait_local(args_, counters_.units_done(earlier),
                        args_.constants.gate_up_units.value() * Orientation::kGateUpSignals);
      ptx::fence_proxy_async_global();  // the copy engine has read what it is to write now
    }
  }

  // Rows [row, row + kPieceRows) of all images.
  __device__ __forceinline__ void assemble(int row) const {
    const int lane = threadIdx.x % 32;
    const int hidden = args_.problem.hidden_size, k_blocks = hidden / kBlockK;

    // The piece's chunk, and where it lies in the chunk's image.
    const int e = expert_of_row(row);
    const int expert = plan_.first_expert() + e;
    const int first_chunk_row = plan_.row_base(expert), chunk = (row - first_chunk_row) / Orientation::kTokenTile;
    const int row_base = first_chunk_row + chunk * Orientation::kTokenTile;
    const int tokens = min(Orientation::kTokenTile, plan_.count(expert) - chunk * Orientation::kTokenTile);
    const int padded = round_up(tokens, 8);
    const int first = row - row_base;
    const int chunk_of_rank = plan_.chunk_base(e) + chunk;
    await_slot(chunk_of_rank);
    const Image image = assembled_image(args_, chunk_of_rank, padded, k_blocks);

    // Lane r has the source of row r; what pads the chunk is its last row again.
    const int source =
        __ldcg(&Group::own(args_.workspace.row_sources)[row_base + min(first + lane % kPieceRows, tokens - 1)].route);
    const uint8_t* columns[kPieceRows / kRowsPerCopy];
#pragma unroll
    for (int i = 0; i < kPieceRows / kRowsPerCopy; ++i) {
      const int route = __shfl_sync(~0u, source, i * kRowsPerCopy + lane / kLanesPerRow);
      columns[i] =
          Group::row_of_route(args_, args_.workspace.token_rows, route, hidden) + lane % kLanesPerRow * sizeof(uint4);
    }

    // Scales: lane r has those of row r % 8, every fourth.
    const float* from = Group::row_of_route(args_, args_.workspace.row_scales, source, k_blocks);
    float* to = image.scales(0) + first + lane % kPieceRows;
#pragma unroll 4
    for (int k = lane / kPieceRows; k < k_blocks; k += 32 / kPieceRows) to[k * padded] = __ldcg(from + k);

    // Planes, some at a time: those that were brought into one half of the buffer leave it while the next ones come to
    // the other half.
    uint8_t* plane = image.plane(0) + first * kBlockK;
    int half = 0;
#pragma unroll 1
    for (int begin = 0; begin < k_blocks + kPlanes; begin += kPlanes, half ^= 1) {
      if (begin < k_blocks) bring(columns, half, min(kPlanes, k_blocks - begin));
      ptx::commit_copies();
      if (begin == 0) continue;
      ptx::wait_copies<1>();
      ptx::fence_proxy_async_shared();
      __syncwarp();
      if (lane == 0) {
        const uint8_t* brought = buffer_ + (half ^ 1) * kPlanes * kPlaneBytes;
        const int planes = min(kPlanes, k_blocks - (begin - kPlanes));
        for (int i = 0; i < planes; ++i, plane += padded * kBlockK) {
          ptx::bulk_copy_shared_to_global(plane, brought + i * kPlaneBytes, kPlaneBytes);
        }
        ptx::commit_bulk_copies();
        ptx::wait_bulk_copies_read();  // the half is free
      }
      __syncwarp();
    }

    // Whoever reads the image does so by the copy engine.
    ptx::fence_proxy_async_global();
    __syncwarp();
    if (lane == 0) {
      ptx::wait_bulk_copies();
      ptx::fence_proxy_async_global();
      ptx::add_release(counters_.assembled(chunk_of_rank), 1);
    }
  }

  // The next `planes` of 128 columns of every row, into a half of the buffer.
  __device__ __forceinline__ void bring(const uint8_t* (&columns)[kPieceRows / kRowsPerCopy], int half,
                                        int planes) const {
    const int lane = threadIdx.x % 32;
    uint8_t* place = buffer_ + half * kPlanes * kPlaneBytes +
                     swizzled_offset(lane / kLanesPerRow, lane % kLanesPerRow * sizeof(uint4));
    static_assert(kRowsPerCopy == 4 && kPieceRows == 8);
    uint8_t* low_place = buffer_ + half * kPlanes * kPlaneBytes +
                         swizzled_offset(lane / kLanesPerRow + kRowsPerCopy, lane % kLanesPerRow * sizeof(uint4));
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      if (i < planes) {
        ptx::copy_async_16(place + i * kPlaneBytes, columns[0] + i * kBlockK, true);
        ptx::copy_async_16(low_place + i * kPlaneBytes, columns[1] + i * kBlockK, true);
      }
    }
    columns[0] += kPlanes * kBlockK;
    columns[1] += kPlanes * kBlockK;
  }

  const MoeArguments& args_;
  const CounterSet& counters_;
  const Plan& plan_;
  uint8_t* buffer_;
};

}  // namespace megamoe
