// The first set-up of a group, growth, how long its memory lives, and what can't be had.
#include "common/device_scope.h"
#include "transport_world.h"

namespace {

int buffers() { return fakes::driver().num_buffers(); }

void test_all_ranks_see_all_buffers() {
  World world(3);
  world.run(3 * kMiB);
  EXPECT(world.is_whole(3 * kMiB));
  for (int r = 0; r < 3; ++r) {
    const Member& member = *world.members[r];
    EXPECT(member.rank() == r && member.num_ranks() == 3 && member.device() == 2 - r && !member.spans_processes());
    EXPECT(std::string(member.transport()) == "peer access");
    for (int peer = 0; peer < 3; ++peer) EXPECT(member.mapped(peer) == world.view(peer).mapped[peer]);
  }
  World alone(1);
  alone.run(kMiB);
  EXPECT(alone.is_whole(kMiB) && std::string(alone.members[0]->transport()) == "own memory");
}

void test_one_buffer_grows() {
  for (const int num_processes : {1, 2, 3}) {
    World world(3, num_processes);
    const int before = buffers();
    const size_t bytes_before = fakes::driver().buffer_bytes();
    world.run(kMiB);
    const Member* const member = world.members[1].get();
    void* const view = member->view();
    const uint64_t* const note = member->note();
    for (const uint64_t size : {3, 9, 20}) {
      world.run(size * kMiB);
      EXPECT(world.is_whole(size * kMiB) && buffers() == before + 3);
      EXPECT(world.members[1].get() == member && member->view() == view && member->note() == note);
    }
    EXPECT(fakes::driver().buffer_bytes() - bytes_before == 3 * size_class(20 * kMiB));
    // Every smaller call is served, on each rank alone: nothing is set up.
    for (const uint64_t size : {20, 9, 3, 1}) {
      for (int r = 0; r < 3; ++r) {
        world.run(size * kMiB, {r}, kShort);
        EXPECT(world.results[r].state == State::kOk);
      }
    }
    EXPECT(world.is_whole(20 * kMiB) && buffers() == before + 3);
    EXPECT(std::string(member->transport()) == (num_processes == 1   ? "peer access"
                                                : num_processes == 3 ? "CUDA IPC"
                                                                     : "CUDA IPC"));
    EXPECT(world.members[0]->spans_processes() == (num_processes > 1));
  }
}

void test_the_largest_wish_decides() {
  World world(3);
  world.run(0, world.all(), kLong, [](int r, Request* request) { request->bytes = (r + 1) * 4 * kMiB; });
  EXPECT(world.is_whole(12 * kMiB));
  // Also where the first call site of a run is the smaller one.
  world.run(2 * kMiB);
  world.call(16 * kMiB, world.all());
  EXPECT(world.is_whole(16 * kMiB));
}

void test_memory_goes_with_the_last_holder() {
  World world(3), other_site(3);
  const size_t before = fakes::driver().allocations.size();
  world.run(kMiB);
  world.run(4 * kMiB);
  const std::vector<std::shared_ptr<const Member>> sites = world.members;
  for (auto& member : world.members) member.reset();
  EXPECT(world.registries[0]->describe_all().size() == 3);
  world.run(2 * kMiB, {0}, kShort);
  EXPECT(world.members[0] == sites[0]);
  for (auto& member : world.members) member.reset();
  {
    auto last = sites[2];
    const_cast<std::vector<std::shared_ptr<const Member>>&>(sites).clear();
    EXPECT(buffers() >= 3 && world.registries[0]->describe_all().size() == 3);
  }
  EXPECT(world.registries[0]->describe_all().empty());
  // Sessions stay: a staging buffer for each rank.
  EXPECT(fakes::driver().allocations.size() == before + 3);
  // Made anew after it was given back; another layout has its own.
  world.run(kMiB);
  const auto first = world.members[0];
  world.run(kMiB, world.all(), kLong, [](int, Request* request) { request->layout = &kOtherLayout; });
  EXPECT(world.is_whole(kMiB) && world.members[0] != first);
}

void test_what_other_processes_map_is_kept() {
  World world(2, 2), with_windows(2, 1, true);
  world.run(kMiB);
  with_windows.run(kMiB, with_windows.all(), kLong, [](int, Request* request) { request->wanted = Wanted::kWindow; });
  EXPECT(with_windows.is_whole(kMiB));
  for (World* each : {&world, &with_windows}) {
    for (auto& member : each->members) member.reset();
    for (Registry* registry : each->registries) EXPECT(!registry->describe_all().empty());
  }
  world.run(kMiB, {1}, kShort);
  EXPECT(world.results[1].state == State::kOk);
}

void test_ranks_that_disagree() {
  World world(3);
  const int before = buffers();
  world.run(kMiB, world.all(), kLong, [](int r, Request* request) {
    if (r == 1) request->layout = &kOtherLayout;
  });
  for (const Result& result : world.results) {
    EXPECT(result.state == State::kNotSetUp);
    EXPECT_CONTAINS(result.text, "rank 1 and rank 0 are in different calls, layouts 2 and 1");
  }
  EXPECT(buffers() == before);
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB));
}

void test_windows_where_there_is_no_peer_access() {
  fakes::driver().unreachable = {{2, 0}};  // device 2 is rank 0
  const int before = buffers();
  World without(3);
  without.run(kMiB);
  for (const Result& result : without.results) {
    EXPECT(result.state == State::kNotSetUp);
    EXPECT_CONTAINS(result.text, "rank 0: there is no peer access from device 2 to device 0");
    EXPECT_CONTAINS(result.text, "NCCL registers no symmetric windows");
    EXPECT_CONTAINS(result.text, "implementation=\"collective\"");
  }
  EXPECT(buffers() == before);
  World with(3, 1, true);
  for (const uint64_t size : {2, 8}) {
    with.run(size * kMiB);
    EXPECT(with.is_whole(size * kMiB));
    for (int r = 0; r < 3 && with.all_are(State::kOk); ++r) {
      EXPECT(std::string(with.members[r]->transport()) == "NCCL window");
      for (int peer = 0; peer < 3; ++peer) EXPECT(with.view(r).mapped[peer] == (*with.windows)[peer]);
    }
  }
  fakes::driver().unreachable.clear();
}

// As in a container that does not share its host's namespace: handles of other processes' memory cannot be opened.
void test_ipc_is_forbidden() {
  const int before = buffers();
  fakes::driver().forbids_ipc = true;
  World without(2, 2), together(2, 1), with(2, 2, true);
  without.run(kMiB);
  for (const Result& result : without.results) {
    EXPECT(result.state == State::kNotSetUp);
    EXPECT_CONTAINS(result.text, "no rank can reach the memory of all others (CUDA IPC: rank 0: cudaIpcOpenMemHandle");
    EXPECT_CONTAINS(result.text, "of rank 1's buffer failed");
    EXPECT_CONTAINS(result.text, "implementation=\"collective\"");
  }
  EXPECT(buffers() == before);
  // One process needs none, and windows do without.
  together.run(kMiB);
  EXPECT(together.is_whole(kMiB));
  with.run(kMiB);
  EXPECT(with.is_whole(kMiB) && std::string(with.members[0]->transport()) == "NCCL window");
  fakes::driver().forbids_ipc = false;
  without.run(kMiB);
  EXPECT(without.is_whole(kMiB));
}

void test_no_memory_for_nccl() {
  for (const int num_processes : {1, 2}) {
    World world(2, num_processes);
    world.clique->has_memory = false;
    for (const int device : {0, 1}) fakes::driver().limits[device] = kMiB;
    world.run(8 * kMiB);
    for (const Result& result : world.results) {
      EXPECT(result.state == State::kNotSetUp);
      EXPECT_CONTAINS(result.text, "ncclAllGather failed: a fake error (what NCCL said last); the device has 1 MiB");
      EXPECT_CONTAINS(result.text, "XLA_PYTHON_CLIENT_MEM_FRACTION");
    }
    fakes::driver().limits.clear();
    world.clique->has_memory = true;
    world.run(8 * kMiB);
    EXPECT(world.is_whole(8 * kMiB));
  }
}

void test_no_memory() {
  for (const int num_processes : {1, 2}) {
    const int before = buffers();
    World world(2, num_processes);
    fakes::driver().limits[0] = 5 * kMiB;  // device 0 is rank 1
    world.run(8 * kMiB);
    for (const Result& result : world.results) {
      EXPECT(result.state == State::kNotSetUp);
      EXPECT_CONTAINS(result.text, "rank 1: cudaMalloc of 8388608 bytes");
      EXPECT_CONTAINS(result.text, "XLA_PYTHON_CLIENT_MEM_FRACTION");
      EXPECT(result.text.find("collective") == std::string::npos);
    }
    EXPECT(buffers() == before);
    world.run(4 * kMiB);
    EXPECT(world.is_whole(4 * kMiB));
    // Growth gives the old buffer back first; that of a smaller call is had again.
    world.run(8 * kMiB);
    EXPECT(world.all_are(State::kNotSetUp) && buffers() == before);
    world.run(2 * kMiB);
    EXPECT(world.is_whole(4 * kMiB) && buffers() == before + 2);
    fakes::driver().limits.clear();
    world.run(8 * kMiB);
    EXPECT(world.is_whole(8 * kMiB) && buffers() == before + 2);
  }
}

void test_another_communicator_at_the_same_address() {
  World world(2);
  world.run(kMiB);
  const std::vector<std::shared_ptr<const Member>> before = world.members;
  std::swap(world.comms[0].rank, world.comms[1].rank);
  world.run(kMiB, {0}, kShort);
  EXPECT(world.results[0].state == State::kNotSetUp);
  EXPECT_CONTAINS(world.results[0].text, "rank 1 of 2, phase introduction");
  world.run(kMiB);
  EXPECT(world.all_are(State::kOk));
  for (int r = 0; r < 2; ++r) EXPECT(world.members[r] != before[r] && world.members[r]->rank() == 1 - r);
}

// A thread that has no context gets none of device 0, which may be another process's; one that has gets its own back.
void test_a_device_scope_leaves_what_was() {
  fakes::driver().contexts.clear();
  std::thread([] {
    int device = 0;
    {
      megamoe::DeviceScope scope(5);
      EXPECT(scope.status() == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 5);
    }
    EXPECT(fakes::driver().contexts.size() == 1);
    cudaSetDevice(3);
    {
      megamoe::DeviceScope scope(5);
    }
    EXPECT(cudaGetDevice(&device) == cudaSuccess && device == 3);
  }).join();
  EXPECT(fakes::driver().contexts.size() == 2);
}

}  // namespace

void test_set_up() {
  test_a_device_scope_leaves_what_was();
  test_all_ranks_see_all_buffers();
  test_one_buffer_grows();
  test_the_largest_wish_decides();
  test_memory_goes_with_the_last_holder();
  test_what_other_processes_map_is_kept();
  test_ranks_that_disagree();
  test_windows_where_there_is_no_peer_access();
  test_ipc_is_forbidden();
  test_no_memory();
  test_no_memory_for_nccl();
  test_another_communicator_at_the_same_address();
}
