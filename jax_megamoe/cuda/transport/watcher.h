// Tells of ranks that waited in vain: no handler does so where a captured graph is replayed, since none runs then.
#pragma once

#include <string>

namespace megamoe::transport {

// What a kernel has left in a note of the handler's kind, in words, or nothing. Called at any time, on any thread: it reads
// host memory that a device may be writing, and nothing else.
using ReadNote = std::string (*)(const void* note, int rank);

// From now on a thread of the process, started by the first call, looks at the note twice a second and writes what it says
// to stderr, once. `unwatch` comes before the note is freed; when it has returned, nobody looks any more.
void watch(const void* note, int rank, ReadNote read);
void unwatch(const void* note);

}  // namespace megamoe::transport
