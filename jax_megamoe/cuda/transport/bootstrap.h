// How the ranks of a communicator introduce themselves and agree, before there is memory that they share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transport/mailbox.h"
#include "transport/nccl_api.h"

namespace megamoe::transport {

// One for each communicator, for as long as the process runs: all-gathers of small records. The first operation does
// them by NCCL, on a stream of its own; once it has made a mailbox, later ones go through that, where all ranks are on
// one host.
//
// A rank that waits in vain leaves its all-gather behind, where a rank that comes later meets it. So the next operation
// first waits for that one: every rank sees how every all-gather ends, and begins none before. Each record carries the
// number of its phase, which is zero only at the start of an operation. Where they differ, some rank has begun anew
// while others went on; all of them see it, and all begin anew.
class Bootstrap {
 public:
  Bootstrap(Communicator communicator, const Place& place) : communicator_(communicator), place_(place) {}
  Bootstrap(const Bootstrap&) = delete;
  Bootstrap& operator=(const Bootstrap&) = delete;

  const Place& place() const { return place_; }
  int rank() const { return place_.rank; }
  int num_ranks() const { return place_.num_ranks; }
  int device() const { return place_.device; }
  Communicator communicator() const { return communicator_; }
  const NcclApi& nccl() const { return *nccl_; }
  cudaStream_t stream() const { return stream_; }
  double timeout_seconds() const { return timeout_seconds_; }
  std::mutex& mutex() { return mutex_; }  // for whoever runs an operation

  // Runs an operation, in which all ranks gather and agree in the same order, on the communicator's device. It is
  // called again where the ranks have to begin anew. Each wait for the others ends after `timeout_seconds`. Returns
  // what is wrong.
  std::string run(double timeout_seconds, const std::function<std::string()>& operation);

  // all->at(r) is what rank r passed as `mine`. `phase` names the step in an error.
  template <typename Record>
  std::string gather(const char* phase, const Record& mine, std::vector<Record>* all) {
    static_assert(sizeof(Record) <= kPayloadBytes, "the staging memory is too small for this record");
    all->resize(num_ranks());
    return gather_bytes(phase, &mine, all->data(), sizeof(Record));
  }

  // The failures of all ranks in one text, the same on each, or nothing: all go on, or none does.
  std::string agree(const char* phase, const std::string& own_failure);

  bool has_mailbox() const { return mailbox_ != nullptr; }
  // A step of an operation that is all but done, where no rank has a mailbox: makes one for the next operations. `name`
  // is the same on all ranks, and nobody else's. Without one all goes on as before; returns what keeps the ranks from
  // agreeing on it.
  std::string make_mailbox(const std::string& name);

  // Whether all ranks have been in the last step. If not, others may still do what they did not hear of.
  bool is_in_step() const { return step_ == Step::kTogether; }

  // The last operation has left an all-gather behind, which waits for a rank: who waits for the device waits as long.
  bool is_stuck() const;

 private:
  enum class Step { kTogether, kBroken, kApart };

  static constexpr size_t kRecordBytes = Mailbox::kRecordBytes, kPayloadBytes = kRecordBytes - sizeof(uint64_t);
  static constexpr int kMaxStarts = 32;  // of one operation

  std::string start(const std::function<std::string()>& operation);
  std::string prepare();
  std::string gather_bytes(const char* phase, const void* mine, void* all, size_t bytes);
  std::string enqueue(const char* phase, const char* record);
  std::string await();
  std::string has_ended(bool* ended);
  void settle_mailbox();
  std::string where(const char* phase) const;

  const NcclApi* nccl_ = nullptr;
  Communicator communicator_;
  Place place_;
  std::mutex mutex_;
  double timeout_seconds_ = 0;
  cudaStream_t stream_ = nullptr;
  char* staging_ = nullptr;  // on the device: the own record, then those of all ranks
  std::unique_ptr<Mailbox> mailbox_;
  std::unique_ptr<Mailbox> new_mailbox_;  // until all are known to have it
  std::vector<char> received_;            // on the host
  const char* pending_ = nullptr;         // the phase whose all-gather has not ended
  std::atomic<bool> is_stuck_{false};
  uint64_t next_phase_ = 0;
  Step step_ = Step::kTogether;
};

}  // namespace megamoe::transport
