// Ways to have a buffer on each rank that all ranks see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/bootstrap.h"
#include "transport/topology.h"

namespace megamoe::transport {

// Every rank goes through allocate, map, unmap and release at the same time; symmetric_buffer.cc lets all agree in
// between. Errors are texts; an empty one is success. What fails can be called again after `unmap` and `release`.
class Backing {
 public:
  virtual ~Backing() = default;  // gives nothing back
  virtual std::string allocate(const Bootstrap& bootstrap, uint64_t bytes) = 0;
  // Fills mapped->at(r) with rank r's buffer as this rank sees it. May gather.
  virtual std::string map(Bootstrap& bootstrap, const Topology& topology, std::vector<void*>* mapped) = 0;
  virtual void unmap() = 0;    // the buffers of others
  virtual void release() = 0;  // the own buffer, when all ranks have unmapped it
  virtual const char* name() const = 0;
  virtual bool needs_communicator() const = 0;  // in order to give anything back
};

std::unique_ptr<Backing> make_peer_backing();    // cudaMalloc; peer access in a process, CUDA IPC between processes
std::unique_ptr<Backing> make_window_backing();  // ncclMemAlloc and a symmetric window
bool has_windows(const NcclApi& nccl);           // whether the second can work with this library

// The error of a buffer that could not be had.
std::string no_memory(const std::string& what, uint64_t bytes, const std::string& reason);

}  // namespace megamoe::transport
