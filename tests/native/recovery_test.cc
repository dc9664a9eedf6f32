// What runs find after a wait has failed, and how a group goes on.
#include "transport_world.h"

namespace {

void expect_failed(const World& world, const std::vector<int>& ranks, const std::string& text) {
  for (const int rank : ranks) {
    EXPECT(world.results[rank].state == State::kFailed);
    EXPECT_CONTAINS(world.results[rank].text, text);
  }
}

void test_once_an_error_and_then_anew() {
  // Whichever device comes first, and also where both come at the same time.
  for (const std::vector<std::vector<int>>& order : {std::vector<std::vector<int>>{{0}, {1}}, {{1}, {0}}, {{0, 1}}}) {
    World world(2);
    const int before = fakes::driver().num_buffers();
    world.run(3 * kMiB);
    const Member* const member = world.members[1].get();
    void* const view = member->view();
    void* const buffer = member->mapped(1);
    static_cast<char*>(buffer)[17] = 1;
    world.leave(1, 'x');
    ++world.last_run;
    for (const std::vector<int>& ranks : order) world.call(kMiB, ranks, kShort);
    expect_failed(world, {0, 1}, "rank 1 left a x");
    world.run(kMiB);
    EXPECT(world.is_whole(3 * kMiB));
    EXPECT(world.members[1].get() == member && member->view() == view && member->mapped(1) == buffer);
    EXPECT(fakes::driver().num_buffers() == before + 2);
    // Further call sites of that run, and Initialize for the second time: each rank alone.
    for (int r = 0; r < 2; ++r) {
      world.call(2 * kMiB, {r}, kShort);
      EXPECT(world.results[r].state == State::kOk);
    }
    world.leave(0, 'y');
    world.run(kMiB);
    expect_failed(world, {0, 1}, "rank 0 left a y");
  }
}

void test_the_first_device_decides_for_the_run() {
  World world(2);
  world.run(kMiB);
  world.run(kMiB, {0}, kShort);
  world.leave(0, 'x');  // another program of device 0 goes on
  world.call(kMiB, {1}, kShort);
  EXPECT(world.all_are(State::kOk));
  // The next program, and then one that has been in Initialize before it.
  const int64_t earlier = world.last_run;
  world.run(kMiB);
  expect_failed(world, {0, 1}, "rank 0 left a x");
  world.call(kMiB, world.all(), kShort, [&](int, Request* request) { request->run_id = earlier; });
  EXPECT(world.all_are(State::kOk));
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB));
}

// Two groups along an axis of one mesh take part in the same runs.
void test_a_failure_is_that_of_all_devices() {
  World failed(2), well(2);
  well.registries = failed.registries;
  for (int r = 0; r < 2; ++r) well.comms[r].device += 2;
  const auto run = [&] {
    failed.run(kMiB);
    well.last_run = failed.last_run;
    well.call(kMiB, well.all());
  };
  run();
  failed.leave(1, 'x');
  run();
  expect_failed(failed, {0, 1}, "rank 1 left a x");
  expect_failed(well, {0, 1}, "rank 1 left a x");
  run();
  EXPECT(failed.is_whole(kMiB) && well.is_whole(kMiB));
  // A group that was never in one run with them is in other programs.
  World replica(2);
  replica.registries = failed.registries;
  replica.last_run = 100;
  replica.run(kMiB);
  failed.leave(0, 'y');
  replica.run(kMiB);
  EXPECT(replica.is_whole(kMiB));
  run();
  expect_failed(well, {0, 1}, "rank 0 left a y");
  // Then they come together, when the failure is known, and one of it has gone on.
  replica.leave(0, 'z');
  run();
  EXPECT(failed.is_whole(kMiB));
  replica.last_run = failed.last_run;
  replica.call(kMiB, replica.all());
  EXPECT(replica.all_are(State::kOk));
  run();
  expect_failed(failed, {0, 1}, "rank 0 left a z");
  expect_failed(well, {0, 1}, "rank 0 left a z");
}

void test_each_process_raises_it() {
  World world(2, 2);
  world.run(kMiB);
  world.leave(0, 'x');
  world.run(kMiB, {0}, kShort);
  expect_failed(world, {0}, "rank 0 left a x");
  // The other process has been told, and says so before it comes.
  world.leave(1, 't');
  ++world.last_run;
  std::thread first([&] { world.enter(0, world.request(0, kMiB)); });
  Result told = world.registries[1]->enter({&world.comms[1], kMiB, 50, &kLayout}, &world.members[1]);
  EXPECT(told.state == State::kFailed);
  EXPECT_CONTAINS(told.text, "rank 1 left a t");
  world.enter(1, world.request(1, kMiB));
  first.join();
  EXPECT(world.is_whole(kMiB));
}

// What fails while the others are already in a set-up of another reason is not lost.
void test_a_failure_that_growth_finds() {
  for (const int num_processes : {1, 2}) {
    World world(2, num_processes);
    world.run(kMiB);
    fakes::driver().on_call = [&](const std::string& function, int device) {
      // Device 0 is rank 1, whose last kernel ends now.
      if (function == "cudaDeviceSynchronize" && device == 0) world.leave(1, 'x');
    };
    world.run(8 * kMiB);
    fakes::driver().on_call = nullptr;
    expect_failed(world, {0, 1}, "rank 1 left a x");
    world.run(8 * kMiB);
    EXPECT(world.is_whole(8 * kMiB));
  }
}

void test_a_peer_that_died_is_an_error_each_time() {
  World world(3, 3);
  const int before = fakes::driver().num_buffers();
  world.run(kMiB);
  for (const int rank : {0, 1}) world.leave(rank, 'x');
  world.run(kMiB, {0, 1}, kShort);
  expect_failed(world, {0}, "rank 0 left a x");
  expect_failed(world, {1}, "rank 1 left a x");
  for (int times = 0; times < 3; ++times) {
    world.run(kMiB, {0, 1}, kShort);
    for (const int rank : {0, 1}) {
      EXPECT(world.results[rank].state == State::kNotSetUp);
      EXPECT_CONTAINS(world.results[rank].text, "the other ranks did not come");
    }
  }
  EXPECT(fakes::driver().num_buffers() == before + 3);
  // It was only late: its kernel finds that the others have given up.
  world.run(kMiB, {2}, kShort);
  EXPECT(world.results[2].state == State::kOk);
  world.leave(2, 't');
  world.run(kMiB, {2}, kShort);
  expect_failed(world, {2}, "rank 2 left a t");
  world.run(kMiB);
  EXPECT(world.is_whole(kMiB) && fakes::driver().num_buffers() == before + 3);
}

}  // namespace

void test_recovery() {
  test_once_an_error_and_then_anew();
  test_the_first_device_decides_for_the_run();
  test_a_failure_is_that_of_all_devices();
  test_each_process_raises_it();
  test_a_failure_that_growth_finds();
  test_a_peer_that_died_is_an_error_each_time();
}
