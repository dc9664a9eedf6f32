// Tells of failed waits: no handler does so where a captured graph is replayed, since none runs then.
#pragma once

#include <cstdint>
#include <string>

namespace megamoe::transport {

// A note is a word of host memory that a rank's device writes when a wait has failed, not zero then.
inline uint64_t load_note(const uint64_t* note) { return __atomic_load_n(note, __ATOMIC_ACQUIRE); }

// What the word says, in words of the handler's kind; `rank` is the one whose note it is.
using ReadNote = std::string (*)(uint64_t record, int rank);

// From now on a thread of the process, started by the first call, looks at the note twice a second and writes what it
// says to stderr, each word once; `watch` again where the note has been set back to zero. `unwatch` comes before the
// note is freed; when it has returned, nobody looks any more.
void watch(const uint64_t* note, int rank, ReadNote read);
void unwatch(const uint64_t* note);

}  // namespace megamoe::transport
