// One zeroed buffer of equal size on every rank of a group, and where this rank's device sees each of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/backing.h"
#include "transport/bootstrap.h"
#include "transport/topology.h"

namespace megamoe::transport {

class SymmetricBuffer {
 public:
  uint64_t bytes() const { return bytes_; }               // 0: there is none, or it is being made
  uint64_t generation() const { return generation_; }     // names the set-up in which all ranks made theirs, or 0
  void* mapped(int rank) const { return mapped_[rank]; }  // rank's buffer, as this rank's device sees it
  const char* transport() const { return transport_; }
  bool spans_processes() const { return spans_processes_; }
  // Whether it has to stay for as long as the process runs: another process may have it mapped, or it may outlive the
  // communicator that it needs in order to be given back.
  bool is_kept() const { return spans_processes_ || (backing_ != nullptr && backing_->needs_communicator()); }

  // Gives back what there is, and makes a buffer of topology.bytes. All ranks do so at the same time, in an operation
  // of the bootstrap, while no kernel uses what there is. All fail or none does, unless one does not come; then it can
  // be called again.
  std::string replace(Bootstrap& bootstrap, const Topology& topology);
  // Of the own buffer, for the memory of this rank.
  std::string clear(Bootstrap& bootstrap);
  // Gives back what a group in one process has, once all devices are idle.
  void close();

 private:
  std::string give_back(Bootstrap& bootstrap, const char* phase);
  std::string open(Bootstrap& bootstrap, const Topology& topology, std::string* unreachable);

  std::unique_ptr<Backing> backing_;  // also that of an unfinished buffer
  std::vector<void*> mapped_;
  uint64_t generation_ = 0;
  // Others may look while it is made.
  std::atomic<bool> spans_processes_{false};
  std::atomic<uint64_t> bytes_{0};
  std::atomic<const char*> transport_{"none"};
};

}  // namespace megamoe::transport
