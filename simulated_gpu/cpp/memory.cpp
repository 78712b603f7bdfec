// Memory and copies of the simulated CUDA runtime: memory of a device is memory of the host.
#include <sys/mman.h>

#include <cstring>

#include "state.h"

using namespace simulated;

namespace {

struct Block {
  size_t size;
  int device;
};
using Blocks = std::map<char*, Block>;
Blocks device_blocks, pinned_blocks;
size_t used[MAX_DEVICES];

const Block* find_block(const Blocks& blocks, const void* pointer, size_t size) {
  auto next = blocks.upper_bound((char*)pointer);
  if (next == blocks.begin()) return nullptr;
  auto& [start, block] = *--next;
  return (char*)pointer + size <= start + block.size ? &block : nullptr;
}

cudaError_t allocate(void** pointer, size_t size) {
  *pointer = nullptr;
  if (!size) return cudaSuccess;
  if (used[device] + size > memory_size()) return cudaErrorMemoryAllocation;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  device_blocks[(char*)start] = {size, device};
  used[device] += size;
  *pointer = start;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  auto block = device_blocks.find((char*)pointer);
  if (block == device_blocks.end()) return cudaErrorInvalidValue;
  used[block->second.device] -= block->second.size;
  munmap(pointer, block->second.size);  // a later access is a crash
  device_blocks.erase(block);
  return cudaSuccess;
}

cudaError_t check_copy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
  bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (size && to_device && !find_block(device_blocks, target, size)) return cudaErrorInvalidValue;
  if (size && from_device && !find_block(device_blocks, source, size)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace

void simulated::complete(Stream* stream, unsigned long long position) {
  std::vector<PendingCopy> later;
  for (auto& copy : stream->pending) {
    if (copy.position > position) {
      later.push_back(std::move(copy));
    } else if (copy.to_host) {
      memcpy(copy.target, copy.bytes.data(), copy.bytes.size());
    } else if (memcmp(copy.source, copy.bytes.data(), copy.bytes.size())) {
      fprintf(stderr, "[simulated] HAZARD: pinned memory changed before it was copied\n");
      abort();
    }
  }
  stream->pending.swap(later);
}

void simulated::complete_device(int index) {
  for (Stream* stream : streams)
    if (stream->device == index) complete(stream);
  complete(&legacy[index]);
}

EXPORT cudaError_t cudaMalloc(void** pointer, size_t size) {
  LOCK;
  CHECK(check_unsafe(__func__));
  FINISH(allocate(pointer, size));
}
EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t stream) {
  LOCK;
  CHECK(enqueue(stream, "cudaMallocAsync"));
  FINISH(allocate(pointer, size));
}
EXPORT cudaError_t cudaFree(void* pointer) {
  LOCK;
  if (pointer) {
    CHECK(check_unsafe(__func__));
    complete_device(device);
  }
  FINISH(release(pointer));
}
EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  LOCK;
  FINISH(release(pointer));
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  LOCK;
  *total = memory_size(), *free = *total - used[device];
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  LOCK;
  CHECK(check_unsafe(__func__));
  if (posix_memalign(pointer, 4096, size ? size : 1)) FINISH(cudaErrorMemoryAllocation);
  memset(*pointer, 0xfb, size);
  pinned_blocks[(char*)*pointer] = {size, device};
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* pointer) {
  LOCK;
  for (int index = 0; index < device_count(); ++index) complete_device(index);
  pinned_blocks.erase((char*)pointer);
  free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  LOCK;
  pinned_blocks[(char*)pointer] = {size, device};
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  LOCK;
  pinned_blocks.erase((char*)pointer);
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* result, const void* pointer) {
  LOCK;
  memset(result, 0, sizeof *result);
  result->type = cudaMemoryTypeUnregistered;
  if (const Block* block = find_block(device_blocks, pointer, 1)) {
    result->type = cudaMemoryTypeDevice, result->device = block->device;
    result->devicePointer = (void*)pointer;
  } else if (const Block* block = find_block(pinned_blocks, pointer, 1)) {
    result->type = cudaMemoryTypeHost, result->device = block->device;
    result->devicePointer = result->hostPointer = (void*)pointer;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
  LOCK;
  CHECK(check_unsafe(__func__));
  CHECK(check_copy(target, source, size, kind));
  complete_device(device);
  memcpy(target, source, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(
    void* target, const void* source, size_t size, cudaMemcpyKind kind, cudaStream_t handle) {
  LOCK;
  CHECK(check_copy(target, source, size, kind));
  CHECK(enqueue(handle, "cudaMemcpyAsync"));
  Stream* stream = find(handle);
  if (stream->capture) return cudaSuccess;  // compute.py computes it at a replay
  auto bytes = [&] { return std::vector<char>((char*)source, (char*)source + size); };
  if (kind == cudaMemcpyDeviceToHost && find_block(pinned_blocks, target, 1)) {
    stream->pending.push_back({target, source, bytes(), true, stream->position});
    memset(target, 0xfb, size);  // until the host has waited
    return cudaSuccess;
  }
  memcpy(target, source, size);
  if (kind == cudaMemcpyHostToDevice && find_block(pinned_blocks, source, 1))
    stream->pending.push_back({target, source, bytes(), false, stream->position});
  else if (kind == cudaMemcpyDeviceToHost)  // CUDA waits for pageable memory
    complete(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(
    void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  LOCK;
  CHECK(enqueue(stream, "cudaMemcpyPeerAsync"));
  memcpy(target, source, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* target, int value, size_t size) {
  LOCK;
  CHECK(check_unsafe(__func__));
  memset(target, value, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  LOCK;
  CHECK(enqueue(stream, "cudaMemsetAsync"));
  if (!find(stream)->capture) memset(target, value, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return *(unsigned long long*)value = 0, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int index) {
  return *pool = cudaMemPool_t(size_t(index + 1)), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  return *(unsigned long long*)value = 0, cudaSuccess;
}
