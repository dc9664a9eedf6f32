#include "transport/mailbox.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace megamoe::transport {

// Of one rank in one of two all-gathers in turn: a rank may be one ahead of another that has still to read.
struct Mailbox::Slot {
  uint64_t number;  // of the all-gather whose record it is
  char record[kRecordBytes];
};

Mailbox::~Mailbox() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
}

std::string Mailbox::create(const std::string& name, int num_ranks) { return map(name, num_ranks, O_CREAT | O_EXCL); }

std::string Mailbox::open(const std::string& name, int num_ranks) { return map(name, num_ranks, 0); }

void Mailbox::remove(const std::string& name) { shm_unlink(name.c_str()); }

std::string Mailbox::map(const std::string& name, int num_ranks, int flags) {
  const int file = shm_open(name.c_str(), O_RDWR | flags, 0600);
  if (file < 0) return std::string("shm_open failed: ") + std::strerror(errno);
  const size_t bytes = 2 * static_cast<size_t>(num_ranks) * sizeof(Slot);
  // New memory is zero: no all-gather has that number. Reserved, and not only promised: where there is none left, a
  // write would end the process.
  int error = flags == 0 ? 0 : posix_fallocate(file, 0, static_cast<off_t>(bytes));
  void* memory = nullptr;
  if (error == 0) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) error = errno;
  }
  const std::string failure = error == 0 ? "" : std::string("mapping it failed: ") + std::strerror(error);
  close(file);
  if (!failure.empty()) return failure;
  memory_ = memory;
  bytes_ = bytes;
  num_ranks_ = num_ranks;
  return {};
}

Mailbox::Slot* Mailbox::slot(uint64_t number, int rank) const {
  return static_cast<Slot*>(memory_) + number % 2 * num_ranks_ + rank;
}

void Mailbox::post(int rank, const void* record) {
  Slot* mine = slot(++number_, rank);
  std::memcpy(mine->record, record, kRecordBytes);
  __atomic_store_n(&mine->number, number_, __ATOMIC_RELEASE);
}

bool Mailbox::collect(void* all) const {
  for (int rank = 0; rank < num_ranks_; ++rank) {
    if (__atomic_load_n(&slot(number_, rank)->number, __ATOMIC_ACQUIRE) < number_) return false;
  }
  for (int rank = 0; rank < num_ranks_; ++rank) {
    std::memcpy(static_cast<char*>(all) + rank * kRecordBytes, slot(number_, rank)->record, kRecordBytes);
  }
  return true;
}

}  // namespace megamoe::transport
