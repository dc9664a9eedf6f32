// One zeroed buffer of equal size on every rank of a group, and a table in each device's memory of where all of them are.
//
// Device code sees `peers()`: void*[num_ranks], the own buffer included, and loads and stores through it like through
// any pointer. It needs not know how the memory came to be mapped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "transport/exchange.h"
#include "transport/plan.h"
#include "transport/watcher.h"

namespace megamoe::transport {

// A way to map the buffers of all ranks. Errors are texts; an empty one is success.
class Backing {
 public:
  virtual ~Backing() = default;
  // Every rank calls it at the same time. Does not return before all ranks have mapped all buffers, or failed to.
  virtual std::string open(Exchange& exchange, const Plan& plan, size_t bytes, std::vector<void*>* peers) = 0;
  virtual const char* name() const = 0;
};

std::unique_ptr<Backing> make_peer_backing();    // cudaMalloc; peer access in a process, CUDA IPC between processes
std::unique_ptr<Backing> make_window_backing();  // ncclMemAlloc and a symmetric window
bool has_windows(const NcclApi& nccl);           // whether the second can work with this library

struct Request {
  Communicator communicator;
  int device;
  uint64_t bytes;
  uint32_t layout;  // names what device code keeps in the buffer: kernels with different layouts never share one
  ReadNote read_note = nullptr;  // null: kernels of this layout leave no notes
  Wanted wanted = Wanted::kAny;
  double timeout_seconds = 120;  // ranks may differ in how long they compile
};

class SymmetricMemory {
 public:
  static constexpr size_t kNoteBytes = 64;

  // Collective over the communicator; blocks until all ranks have come, `timeout_seconds` at most for each step. After
  // the last step of it no rank allocates, frees or maps anything, so that a rank may at once start a kernel that waits
  // for the others.
  static std::string create(const Request& request, std::unique_ptr<SymmetricMemory>* result);
  ~SymmetricMemory();

  int rank() const { return exchange_.rank(); }
  int num_ranks() const { return exchange_.num_ranks(); }
  int device() const { return exchange_.device(); }
  size_t bytes() const { return bytes_; }
  void* const* peers() const { return table_; }    // on the device
  void* local() const { return mapped_[rank()]; }  // as this rank's device sees its own buffer
  void* mapped(int rank) const { return mapped_[rank]; }
  void* note() const { return note_; }  // kNoteBytes, zero, in host memory that this rank's device writes when it fails
  std::string failure() const;          // what the note says, or nothing
  const char* transport() const { return backing_->name(); }
  bool spans_processes() const { return plan_.spans_processes; }
  const uint64_t* group() const { return group_; }  // the same two words on all ranks

 private:
  SymmetricMemory() = default;
  std::string open(const Request& request);
  std::string map();
  std::string write_table();

  Exchange exchange_;
  Plan plan_;
  size_t bytes_ = 0;
  uint64_t group_[2] = {};
  std::unique_ptr<Backing> backing_;
  std::vector<void*> mapped_;
  void** table_ = nullptr;
  void* note_ = nullptr;
  ReadNote read_note_ = nullptr;
};

}  // namespace megamoe::transport
