// Guard bands: what lies before and behind a buffer, in a pattern that no kernel may change.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "timing.h"

namespace probe {

class Guards {
 public:
  // More than what one copy of the kernel moves; a multiple of every alignment that it asks for.
  static constexpr size_t kBandBytes = 128 << 10;

  // A buffer of exactly so many bytes on the current device, between two bands. `name` is what a report calls it.
  void* allocate(const char* name, size_t bytes) {
    uint8_t* base;
    CHECK(cudaMalloc(reinterpret_cast<void**>(&base), bytes + 2 * kBandBytes));
    for (uint8_t* band : {base, base + kBandBytes + bytes}) {
      CHECK(cudaMemcpy(band, pattern().data(), kBandBytes, cudaMemcpyHostToDevice));
    }
    buffers_[base + kBandBytes] = {name, bytes};
    return base + kBandBytes;
  }

  // Frees what `allocate` returned; false where it did not.
  bool release(const void* buffer) {
    const auto found = buffers_.find(static_cast<const uint8_t*>(buffer));
    if (found == buffers_.end()) return false;
    CHECK(cudaFree(const_cast<uint8_t*>(found->first) - kBandBytes));
    buffers_.erase(found);
    return true;
  }

  // A line for each band that has changed, or nothing; waits for the device.
  std::string damage() const {
    std::string lines;
    for (const auto& [address, buffer] : buffers_) {
      lines += report(buffer.name + " is written before its begin, first at byte ", address - kBandBytes,
                      -static_cast<long long>(kBandBytes));
      lines += report(buffer.name + " is written behind its end, first at byte ", address + buffer.bytes, 0);
    }
    return lines;
  }

  // NaN as bf16 and f32, every second byte as e4m3, and no expert's id as int32: what is read of a band shows in the
  // result. It changes from place to place, so that a copy of a band shows as well.
  static const std::vector<uint8_t>& pattern() {
    static const std::vector<uint8_t> bytes = [] {
      std::vector<uint8_t> made(kBandBytes);
      for (size_t i = 0; i < kBandBytes; ++i) made[i] = i % 2 == 0 ? 0x81 + i / 2 % 127 : 0x7f;
      return made;
    }();
    return bytes;
  }

 private:
  struct Buffer {
    std::string name;
    size_t bytes;
  };

  // `origin`: the number of the band's first byte, counted from the buffer's begin or end.
  static std::string report(const std::string& what, const uint8_t* band, long long origin) {
    std::vector<uint8_t> found(kBandBytes);
    CHECK(cudaMemcpy(found.data(), band, kBandBytes, cudaMemcpyDeviceToHost));
    if (found == pattern()) return {};
    long long first = 0, count = 0;
    for (size_t i = 0; i < kBandBytes; ++i) {
      if (found[i] == pattern()[i]) continue;
      if (count++ == 0) first = origin + static_cast<long long>(i);
    }
    return what + std::to_string(first) + ", " + std::to_string(count) + " bytes in all\n";
  }

  std::map<const uint8_t*, Buffer> buffers_;
};

// Where there are some, all that is allocated lies between them.
inline Guards* guards = nullptr;

// Whether no band has changed; prints which ones have.
inline bool bands_are_whole() {
  const std::string damage = guards == nullptr ? "" : guards->damage();
  std::printf("%s", damage.c_str());
  return damage.empty();
}

}  // namespace probe
