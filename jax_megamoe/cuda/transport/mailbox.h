// All-gathers of small records between ranks on one host, through memory of the host.
//
// NCCL's all-gather is a kernel: one that waits for a rank that died stays on the device for ever, and whatever waits
// for the device waits as long, the end of the process too. Here a rank that waits in vain has left a record behind,
// and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace megamoe::transport {

class Mailbox {
 public:
  static constexpr size_t kRecordBytes = 512;

  Mailbox() = default;
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // The same name on all ranks, which nobody else has. One rank creates it before the others open it, and removes the
  // name when all have. Return what is wrong.
  std::string create(const std::string& name, int num_ranks);
  std::string open(const std::string& name, int num_ranks);
  static void remove(const std::string& name);

  // The own record of the next all-gather, kRecordBytes of them.
  void post(int rank, const void* record);
  // Whether all ranks have posted theirs; then `all` has them, by rank.
  bool collect(void* all) const;

 private:
  struct Slot;

  std::string map(const std::string& name, int num_ranks, int flags);
  Slot* slot(uint64_t number, int rank) const;

  void* memory_ = nullptr;
  size_t bytes_ = 0;
  int num_ranks_ = 0;
  uint64_t number_ = 0;  // of the all-gather that was posted last
};

}  // namespace megamoe::transport
