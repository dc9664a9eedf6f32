// Expert groups with ranks as threads: plans, watcher and the end of a process here, the rest in the other parts. The
// argument is the library that stands for NCCL. With "place" before it, or alone: what comes of asking for a rank's
// place. With "windows": how ranks without peer access reach each other by a library that tells no host of pointers.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>

#include "transport/identity.h"
#include "transport/window_table.h"
#include "transport_world.h"

namespace megamoe::transport {

// As a build with the headers of 2.28.
bool can_read_window_table(int version) { return version / 100 == 228; }
std::string read_window_table(Window window, cudaStream_t, std::vector<void*>* peers) {
  const fakes::Comm* comm = static_cast<fakes::Comm*>(window);
  for (size_t peer = 0; peer < peers->size(); ++peer) (*peers)[peer] = comm->window_of(static_cast<int>(peer));
  return {};
}

Identity identify() { return {{1, 1}, {1, static_cast<uint64_t>(fakes::process)}}; }
uint64_t draw_token() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace megamoe::transport

namespace {

// What the process writes to stderr while this lives; standard error again afterwards.
class Stderr {
 public:
  Stderr() : before_(dup(2)), file_(std::tmpfile()) { dup2(fileno(file_), 2); }
  ~Stderr() {
    dup2(before_, 2);
    close(before_);
    std::fclose(file_);
  }
  std::string text() const {
    char bytes[4096];
    return std::string(bytes, pread(fileno(file_), bytes, sizeof(bytes), 0));
  }
  bool comes(const std::string& part) const {
    for (int tries = 0; tries < 100; ++tries, std::this_thread::sleep_for(std::chrono::milliseconds(50))) {
      if (text().find(part) != std::string::npos) return true;
    }
    return false;
  }

 private:
  int before_;
  std::FILE* file_;
};

std::atomic<bool> is_driver_gone{false}, is_slow{false};

std::string read_watched_note(uint64_t record, int rank) {
  if (is_driver_gone) _exit(3);
  while (is_slow) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return read_note(record, rank);
}

constexpr Layout kWatchedLayout = {3, sizeof(View), fill_view, read_watched_note};

void with_notes(int, Request* request) { request->layout = &kWatchedLayout; }

void test_failures_are_told_once_each() {
  Stderr written;
  World ranks(3), silent(3), again(2);
  ranks.run(kMiB, ranks.all(), kLong, with_notes);
  silent.run(kMiB, silent.all(), kLong, [](int, Request* request) { request->layout = &kOtherLayout; });
  silent.leave(0, 'c');  // by a handler whose notes nobody reads
  ranks.leave(1, 'a');
  EXPECT(written.comes("jax_megamoe: rank 1 left a a\n"));
  ranks.leave(2, 'b');
  EXPECT(written.comes("jax_megamoe: rank 2 left a b\n"));
  int num_failures = 0;
  for (const Description& memory : ranks.registries[0]->describe_all()) num_failures += !memory.failure.empty();
  EXPECT(num_failures == 2);
  for (const Description& memory : silent.registries[0]->describe_all()) EXPECT(memory.failure.empty());
  // Set up anew, the group may fail in the same way again.
  ranks.run(kMiB, ranks.all(), kLong, with_notes);
  ranks.run(kMiB, ranks.all(), kLong, with_notes);
  EXPECT(ranks.is_whole(kMiB));
  ranks.leave(1, 'a');
  EXPECT(written.comes("b\njax_megamoe: rank 1 left a a\n"));
  // Groups that go away are looked at no more; their notes are freed memory.
  for (auto& member : ranks.members) member.reset();
  again.run(kMiB, again.all(), kLong, with_notes);
  again.leave(0, 'd');
  EXPECT(written.comes("rank 0 left a d\n"));
  EXPECT(written.text() ==
         "jax_megamoe: rank 1 left a a\njax_megamoe: rank 2 left a b\njax_megamoe: rank 1 left a a\n"
         "jax_megamoe: rank 0 left a d\n");
}

// A child ends although the watcher held its lock while the process forked.
void test_a_forked_child_ends() {
  World ranks(2);
  ranks.run(kMiB, ranks.all(), kLong, with_notes);
  is_slow = true;
  ranks.leave(0, 'e');
  std::this_thread::sleep_for(std::chrono::milliseconds(800));
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) std::exit(0);
  int status = -1;
  for (int tries = 0; tries < 500 && waitpid(child, &status, WNOHANG) == 0; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT(status == 0);
  if (status != 0) kill(child, SIGKILL);
  is_slow = false;
}

// The process ends while notes are watched: nobody waits for the watcher, and it does not read them any more.
void end_with_a_group() {
  static World* ranks = new World(2);
  ranks->registries[0] = &Registry::get();
  ranks->run(kMiB, ranks->all(), kLong, with_notes);
  EXPECT(ranks->is_whole(kMiB));
}

// Prints by what way, or why not, with peer access and without; and what comes of asking for windows alone.
void show_windows() {
  World with(2, 1, true), without(2, 1, true), asked(2, 1, true);
  const auto show = [](const World& world) {
    const Result& result = world.results[0];
    std::printf("%s\n", result.state == State::kOk ? world.members[0]->transport() : result.text.c_str());
  };
  with.run(kMiB);
  show(with);
  fakes::driver().unreachable = {{0, 1}, {1, 0}};
  without.run(kMiB);
  show(without);
  asked.run(kMiB, asked.all(), kLong, [](int, Request* request) { request->wanted = Wanted::kWindow; });
  show(asked);
  // With peer access again, the group that could not be set up is.
  fakes::driver().unreachable.clear();
  without.run(kMiB);
  std::printf("%s\n", without.is_whole(kMiB) ? "whole" : "not whole");
}

void test_plans() {
  std::vector<Introduction> ranks(4);
  for (int r = 0; r < 4; ++r) {
    ranks[r].version = Introduction::kVersion;
    ranks[r].device = r % 2;
    ranks[r].identity.process[0] = r / 2;
    ranks[r].token = 10 + r;
    ranks[r].bytes = 100 - r;
  }
  Topology topology;
  EXPECT(read_topology(ranks, 1, &topology).empty());
  const std::vector<Reach> wanted = {Reach::kSameProcess, Reach::kSelf, Reach::kSameHost, Reach::kSameHost};
  EXPECT(topology.reach == wanted && topology.spans_processes && topology.may_map && !topology.may_use_windows);
  EXPECT(topology.bytes == 100 && topology.group == 10 && topology.generation == 10 && !topology.keeps_buffers);
  for (Introduction& rank : ranks) rank.generation = 7, rank.buffer_bytes = 100;
  ranks[2].group = 3;
  EXPECT(read_topology(ranks, 1, &topology).empty() && topology.keeps_buffers && topology.group == 3);
  ranks[3].generation = 6;
  EXPECT(read_topology(ranks, 1, &topology).empty() && !topology.keeps_buffers);
  ranks[3].identity.host[1] = 1;
  EXPECT(read_topology(ranks, 1, &topology).empty());
  EXPECT(topology.reach[3] == Reach::kOtherHost && topology.spans_hosts && !topology.may_map);
  ranks[1].device = 0;
  EXPECT_CONTAINS(read_topology(ranks, 2, &topology), "rank 0 and rank 1 are both on device 0");
  ranks[1].device = 1;
  ranks[1].version = 99;
  EXPECT_CONTAINS(read_topology(ranks, 2, &topology), "different versions");
}

void test_size_classes() {
  EXPECT(size_class(1) == 2 << 20 && size_class(2 << 20) == 2 << 20);
  for (uint64_t bytes : {(2ull << 20) + 1, 5ull << 20, 100ull << 20, (1ull << 30) - 1, 3ull << 30}) {
    const uint64_t rounded = size_class(bytes);
    EXPECT(rounded >= bytes && rounded - bytes <= bytes / 8 && size_class(rounded) == rounded);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (std::string(arguments[1]) == "place") {
    if (count > 2 && dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) return 2;
    Place place;
    std::printf("%s\n", place_of(nullptr, &place).c_str());
    return 0;
  }
  if (std::string(arguments[1]) == "windows") {
    if (dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) return 2;
    show_windows();
    std::fflush(stdout);
    std::_Exit(fakes::driver().faults.empty() ? 0 : 1);
  }
  // Before any group, as the driver does.
  std::atexit([] {
    is_driver_gone = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
  });
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  test_size_classes();
  test_plans();
  test_set_up();
  test_late_ranks();
  test_recovery();
  test_failures_are_told_once_each();
  test_a_forked_child_ends();
  end_with_a_group();
  for (const std::string& fault : fakes::driver().faults)
    expect(false, ("no fault: " + fault).c_str(), __FILE__, __LINE__);
  std::printf("%d failed\n", num_failed);
  return num_failed != 0;
}
