// Ranks that come to a set-up after the others have given up, and come together at last.
#include <random>

#include "transport_world.h"

namespace {

void expect_in_vain(const World& world, int rank, const std::string& phase) {
  EXPECT(world.results[rank].state == State::kNotSetUp);
  EXPECT_CONTAINS(world.results[rank].text, "rank " + std::to_string(rank) + " of " + std::to_string(world.num_ranks) +
                                                ", phase " + phase + ": the other ranks did not come within");
}

void test_a_rank_that_comes_later() {
  World world(2);
  for (int tries = 0; tries < 3; ++tries) {
    world.run(kMiB, {0}, kShort);
    expect_in_vain(world, 0, "introduction");
  }
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB));
}

void test_two_that_never_meet_at_first() {
  World world(2, 2);
  world.run(kMiB, {0}, kShort);
  // Meets what the other has left behind, and nothing after it.
  world.run(4 * kMiB, {1}, kShort);
  expect_in_vain(world, 1, "topology");
  world.run(kMiB, {0}, kShort);
  expect_in_vain(world, 0, "introduction");
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB));
}

void test_one_of_three_is_late_twice() {
  World world(3, 3);
  const int before = fakes::driver().num_buffers();
  for (int times = 0; times < 2; ++times) {
    world.run(kMiB, {0, 1}, kShort);
    expect_in_vain(world, 0, "introduction");
    expect_in_vain(world, 1, "introduction");
    world.run(kMiB, {2}, kShort);
    EXPECT(world.results[2].state == State::kNotSetUp);
  }
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB) && fakes::driver().num_buffers() == before + 3);
  // Growth, too.
  world.run(8 * kMiB, {0, 2}, kShort);
  expect_in_vain(world, 0, "introduction");
  world.run(8 * kMiB);
  EXPECT(world.is_whole(8 * kMiB) && fakes::driver().num_buffers() == before + 3);
}

void test_growth_that_one_begins_alone() {
  World world(2, 2);
  const int before = fakes::driver().num_buffers();
  world.run(kMiB);
  // Rank 0 gives up; rank 1 goes on to what rank 0 has not agreed to.
  world.run(4 * kMiB, {0}, kShort);
  world.run(4 * kMiB, {1}, kShort);
  expect_in_vain(world, 1, "topology");
  EXPECT(fakes::driver().num_buffers() == before + 2);
  world.run(4 * kMiB);
  EXPECT(world.is_whole(4 * kMiB) && fakes::driver().num_buffers() == before + 2);
}

// Rank 1 takes its time over some part of a growth, and rank 0 gives up there.
void test_a_rank_that_gives_up_in_the_middle() {
  for (const auto& [function, phase] : {std::pair<std::string, std::string>{"cudaDeviceSynchronize", "introduction"},
                                        {"cudaMalloc", "allocation"},
                                        {"cudaIpcOpenMemHandle", "mapping"}}) {
    World world(2, 2);
    const int before = fakes::driver().num_buffers();
    world.run(kMiB);
    fakes::driver().on_call = [&, slow = function](const std::string& called, int device) {
      if (called == slow && device == 0) std::this_thread::sleep_for(std::chrono::milliseconds(400));
    };
    ++world.last_run;
    std::thread slow([&] { world.enter(1, world.request(1, 4 * kMiB)); });
    world.enter(0, world.request(0, 4 * kMiB, kShort));
    expect_in_vain(world, 0, phase);
    // Comes back while rank 1 waits.
    world.enter(0, world.request(0, 4 * kMiB));
    slow.join();
    fakes::driver().on_call = nullptr;
    EXPECT(world.is_whole(4 * kMiB) && fakes::driver().num_buffers() == before + 2);
  }
}

// Rank 0 gives up in the last step of all, so that rank 1 takes the group to be well, and waits in vain then.
void test_a_rank_that_gives_up_at_the_end() {
  World world(2, 2);
  world.run(kMiB);
  fakes::driver().on_call = [](const std::string& called, int device) {
    if (called == "cudaMemsetAsync" && device == 0) std::this_thread::sleep_for(std::chrono::milliseconds(400));
  };
  world.run(4 * kMiB, world.all(), kLong, [](int r, Request* request) {
    if (r == 0) request->timeout_seconds = kShort;
  });
  fakes::driver().on_call = nullptr;
  expect_in_vain(world, 0, "view");
  EXPECT(world.results[1].state == State::kOk);
  world.run(4 * kMiB, world.all(), kShort);
  expect_in_vain(world, 0, "introduction");
  world.leave(1, 'x');
  world.run(4 * kMiB, {1}, kShort);
  EXPECT(world.results[1].state == State::kFailed);
  world.run(4 * kMiB);
  EXPECT(world.is_whole(4 * kMiB));
}

void test_ranks_that_come_and_go() {
  std::mt19937 random(7);
  for (int round = 0; round < 12; ++round) {
    World world(3, 1 + round % 3);
    const int before = fakes::driver().num_buffers();
    const int num_runs = 1 + random() % 4;
    for (int run = 0; run < num_runs; ++run) {
      std::vector<int> present;
      for (int r = 0; r < 3; ++r) {
        if (random() % 2) present.push_back(r);
      }
      // Some give up in the middle of what the others do.
      const int delay = random() % 3;
      world.run((1 + random() % 8) * kMiB, present, 0.02,
                [&](int r, Request*) { std::this_thread::sleep_for(std::chrono::milliseconds(r * delay * 9)); });
    }
    world.run(9 * kMiB);
    EXPECT(world.is_whole(9 * kMiB) && fakes::driver().num_buffers() == before + 3);
    for (const Result& result : world.results) {
      if (result.state != State::kOk) std::printf("round %d: %s\n", round, result.text.c_str());
    }
  }
}

// An all-gather that is left behind keeps the device busy: nothing may wait for it without a limit.
void test_another_group_on_the_same_device() {
  World stuck(2), other(2);
  other.registries = stuck.registries;
  other.run(kMiB);
  stuck.run(kMiB, {0}, kShort);
  other.run(4 * kMiB);
  EXPECT(other.all_are(State::kNotSetUp));
  EXPECT_CONTAINS(other.results[1].text, "rank 0: device 1 still waits for a rank of another group");
  stuck.run(kMiB);
  other.run(4 * kMiB);
  EXPECT(stuck.is_whole(kMiB) && other.is_whole(4 * kMiB));
}

}  // namespace

void test_late_ranks() {
  test_a_rank_that_comes_later();
  test_two_that_never_meet_at_first();
  test_one_of_three_is_late_twice();
  test_growth_that_one_begins_alone();
  test_a_rank_that_gives_up_in_the_middle();
  test_a_rank_that_gives_up_at_the_end();
  test_ranks_that_come_and_go();
  test_another_group_on_the_same_device();
}
