// The order of the tickets of one projection: from a ticket's number to the expert, the tile and the chunk that it is
// for.
//
// Tickets go expert by expert, tile by tile, chunk by chunk, so that only the first of an expert's chunks reads a tile
// of weights from device memory. Two exceptions, for down units:
//   - swapAB: the chunk with the fewest tokens comes last. Nothing else is left to do by then, and its units take the
//     least time.
//   - Normal: the last experts, the tail, go tile by tile over all of them, so that columns are complete one after the
//     other and the combine can start on finished ones.
//
// Where images go through rings, those of tokens and those of activations, gate/up and down tickets take turns
// (in_turns), and an expert's chunks are divided into runs (place_in_run).
//
// All of it is three small maps: from the place in the order to a chunk, from there to the run of chunks that take
// turns, and from the number in the run to a tile and a chunk. tests/test_unit_order.py compares them with one formula.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "layout/tiles.h"

namespace megamoe {

// A ticket, before the CTAs of a cluster divide it (layout/cluster_share.h).
struct TicketPlace {
  int expert;  // of this rank
  int group;   // a tile, or as many as the CTAs of a cluster share
  int member;  // the chunk, counted from the expert's first
};

// The chunks in their order, but `smallest` last; `smallest` beyond all of them: there is none.
__host__ __device__ inline int chunk_at(int place, int smallest, int num_chunks) {
  if (place < smallest) return place;
  return place == num_chunks - 1 ? smallest : place + 1;
}

// The last expert whose first chunk is not after `chunk`; experts without tokens share their successor's first chunk.
// `Chunks` has num_experts(), num_chunks(), smallest_chunk(), and chunk_base(expert), an expert's first chunk.
template <typename Chunks>
__host__ __device__ inline int expert_of_chunk(const Chunks& chunks, int chunk) {
  int low = 0, high = chunks.num_experts() - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (chunks.chunk_base(middle) <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Ticket `index` of a projection that has `tickets` for every chunk; `first_tail`: the tail's first chunk.
template <bool kSwapsOperands, typename Chunks>
__host__ __device__ inline TicketPlace ticket_place(const Chunks& chunks, bool down, int index, const Divisor& tickets,
                                                    int first_tail) {
  // Place to chunk. The index follows: it becomes that of the same ticket, were the chunks in their order.
  int chunk = tickets.divide(index);
  if (kSwapsOperands && down) {
    const int place = chunk;
    chunk = chunk_at(place, chunks.smallest_chunk(), chunks.num_chunks());
    index += (chunk - place) * static_cast<int>(tickets.value());
  }

  // Chunk to the run of chunks that take turns: the expert's, or the tail.
  TicketPlace at;
  const bool tail = !kSwapsOperands && down && chunk >= first_tail;
  at.expert = expert_of_chunk(chunks, chunk);
  const int first = tail ? first_tail : chunks.chunk_base(at.expert);
  const int turns = (tail ? chunks.num_chunks() : chunks.chunk_base(at.expert + 1)) - first;

  // Ticket in the run to tile and chunk: tile by tile, each chunk once.
  const int within = index - first * static_cast<int>(tickets.value());
  at.group = turns == 1 ? within : within / turns;
  at.member = within - at.group * turns;
  if (tail) {
    at.expert = expert_of_chunk(chunks, first + at.member);
    at.member += first - chunks.chunk_base(at.expert);
  }
  return at;
}

// A ticket of both projections together: which of them, and its number there.
struct ProjectionTicket {
  bool down;
  int index;
};

// How both projections take turns where images go through rings. Each turn costs time: the L2 has to hold weights of
// both.
struct Turns {
  int ahead;        // chunks that gate/up tickets are ahead of down tickets, before a turn
  int chunks;       // of a turn
  int gate_up;      // tickets of a chunk
  int down;         // likewise
  Divisor tickets;  // of a turn

  Turns() = default;
  Turns(int ahead, int chunks, int gate_up, int down)
      : ahead(ahead), chunks(chunks), gate_up(gate_up), down(down), tickets(chunks * (gate_up + down)) {}
};

// Gate/up tickets of `ahead` chunks, then in turns down tickets of some chunks and gate/up tickets of as many later ones,
// and the other down tickets at the end.
//
// A ticket may be for any chunk of its run (place_in_run), of up to G or D chunks, a multiple of G. So that no ticket
// waits for a higher one, `ahead` has to be at least a turn and D - 1, and the ring of activations longer than that by
// G + D - 2.
__host__ __device__ inline ProjectionTicket in_turns(int ticket, int num_chunks, const Turns& by) {
  const int ahead = by.ahead < num_chunks ? by.ahead : num_chunks;
  const int first = ahead * by.gate_up;
  if (ticket < first) return {false, ticket};
  ticket -= first;
  // The turns before this one. The last may have fewer gate/up tickets, or none, and all down tickets that are left.
  int left = num_chunks - ahead;
  int turns = by.tickets.divide(ticket);
  if (turns * by.chunks > left) turns = left / by.chunks;
  left -= turns * by.chunks;
  ticket -= turns * static_cast<int>(by.tickets.value());
  const int down_tickets = by.chunks * by.down;
  const int gate_up_tickets = (left < by.chunks ? left : by.chunks) * by.gate_up;
  if (ticket < down_tickets) return {true, turns * down_tickets + ticket};
  ticket -= down_tickets;
  if (ticket < gate_up_tickets) return {false, first + turns * by.chunks * by.gate_up + ticket};
  return {true, (turns + 1) * down_tickets + ticket - gate_up_tickets};
}

// The same ticket of a projection where images go through rings: of an expert with `num_chunks`, runs of `run_chunks`
// one after the other, so that all of a run are complete soon after its first is begun. `place` has the ticket's number
// in `group` and `member`; afterwards these are of the run whose first chunk `first` is.
__host__ __device__ inline TicketPlace place_in_run(const TicketPlace& place, int num_chunks, int tickets,
                                                    int run_chunks, int* first) {
  const int within = place.group * num_chunks + place.member;
  *first = within / (run_chunks * tickets) * run_chunks;
  const int turns = num_chunks - *first < run_chunks ? num_chunks - *first : run_chunks;
  const int within_run = within - *first * tickets;
  const int group = within_run / turns;
  return {place.expert, group, within_run - group * turns};
}

}  // namespace megamoe
