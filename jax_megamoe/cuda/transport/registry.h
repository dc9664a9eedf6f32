// The symmetric buffers of this process: one per communicator, layout and size class, shared by all call sites.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transport/symmetric_memory.h"

namespace megamoe::transport {

// The buffers that the ranks of one group have in this process. They live and die together: a call site that holds one of
// them holds all, so that all ranks of the process find the group alive, or none does.
class SymmetricGroup {
 public:
  ~SymmetricGroup();

  // Null where that device has none.
  const SymmetricMemory* on_device(int device) const;

 private:
  friend class Registry;
  mutable std::mutex mutex_;
  std::map<int, std::unique_ptr<SymmetricMemory>> members_;  // by device
};

// Returns the group that holds a buffer of at least so many bytes on the device, and makes it where there is none; then
// all ranks of the communicator have to be here. Called in Initialize, on each device's own host thread. Whoever keeps the
// group keeps the buffers; of groups that span processes, and of windows, the process keeps one too, for ever: executables
// are dropped at different times in different processes, and a rank alone can't make a new buffer.
std::string acquire(const Request& request, std::shared_ptr<SymmetricGroup>* group);

struct Description {
  int device, rank, num_ranks;
  uint64_t bytes;
  std::string transport;
  bool spans_processes;
  std::string failure;  // why the rank can't go on, or nothing
};
std::vector<Description> describe_all();

}  // namespace megamoe::transport
