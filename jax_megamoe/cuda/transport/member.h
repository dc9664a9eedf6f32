// A rank's part in an expert group: what its kernels find at addresses that stay the same while the group lives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "transport/bootstrap.h"
#include "transport/topology.h"
#include "transport/symmetric_buffer.h"
#include "transport/watcher.h"

namespace megamoe::transport {

// What a handler's kernels keep in the buffer; a constant of the handler.
struct Layout {
  uint32_t id;        // kernels with different layouts never share a buffer
  size_t view_bytes;  // of the view: how device code finds the buffers of all ranks
  // Writes the image of the view, zero until then. mapped[r] is rank r's buffer of `bytes`, as the device of `rank`
  // sees it.
  void (*fill)(void* view_image, void* const* mapped, int rank, int num_ranks, uint64_t bytes);
  ReadNote read_note;  // null: the kernels leave no notes
};

enum class State { kOk, kFailed, kNotSetUp };

struct Result {
  State state;       // kFailed: a rank waited in vain, in an earlier run
  std::string text;  // why not kOk
};

class Member {
 public:
  Member(Bootstrap& bootstrap, const Layout& layout, Wanted wanted)
      : bootstrap_(bootstrap), layout_(layout), wanted_(wanted) {}
  ~Member();  // only of a group in one process, when its devices are idle
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  int rank() const { return bootstrap_.rank(); }
  int num_ranks() const { return bootstrap_.num_ranks(); }
  int device() const { return bootstrap_.device(); }
  void* view() const { return view_; }      // on the device
  uint64_t* note() const { return note_; }  // on the host; the device may write it
  uint64_t bytes() const { return buffer_.bytes(); }
  void* mapped(int rank) const { return buffer_.mapped(rank); }
  const char* transport() const { return buffer_.transport(); }
  bool spans_processes() const { return buffer_.spans_processes(); }
  std::string failure() const;  // what the note says, or nothing

  // What only the registry asks.
  const Bootstrap& bootstrap() const { return bootstrap_; }
  bool is_ready() const { return is_ready_; }          // kernels may use it
  bool is_kept() const { return buffer_.is_kept(); }   // until the process ends
  uint64_t generation() const { return generation_; }  // names the last set-up that succeeded, on all ranks
  uint64_t group() const { return group_; }            // names the group, on all ranks; 0 before the first set-up

  struct Wish {
    uint64_t bytes;
    bool is_told;          // the failure in the note, if there is one, has been raised
    std::string obstacle;  // why this rank can't take part, or nothing
    double timeout_seconds;
  };
  // Makes the buffers of all ranks, makes them anew, or only sets back what is in them: view, note and buffer are as on
  // the first day then. All ranks do so at the same time, and none launches meanwhile. After the last step no rank
  // allocates, frees or maps anything, so that one may at once start a kernel that waits for the others.
  Result rebuild(const Wish& wish);

 private:
  std::string build(const Wish& wish, State* state);
  Introduction introduction(const Wish& wish) const;
  std::string write_view();
  static std::string mailbox_name(uint64_t group);

  Bootstrap& bootstrap_;
  const Layout& layout_;
  const Wanted wanted_;
  SymmetricBuffer buffer_;
  void* view_ = nullptr;
  uint64_t* note_ = nullptr;
  uint64_t largest_ = 0;  // wish that was fulfilled
  uint64_t group_ = 0, generation_ = 0;
  std::atomic<bool> is_ready_{false};
};

}  // namespace megamoe::transport
