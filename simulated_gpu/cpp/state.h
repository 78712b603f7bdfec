// What the files of the simulated CUDA runtime share: streams, captures, memory, and one lock.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define LOCK std::lock_guard<std::recursive_mutex> guard_(simulated::lock)
// Keeps an error for cudaGetLastError(), as CUDA does, and returns it.
#define FINISH(error) return simulated::finish(error, __func__)
#define CHECK(error)                               \
  do {                                             \
    cudaError_t error_ = (error);                  \
    if (error_ != cudaSuccess) FINISH(error_);     \
  } while (0)

namespace simulated {

struct Stream;

struct Graph {
  std::vector<std::string> nodes;
  std::vector<std::pair<void*, cudaHostFn_t>> owned;  // released with the graph
};

struct Capture {
  Graph* graph;
  cudaStreamCaptureMode mode;
  unsigned long long id;
  Stream* origin;
  const void* thread;  // that began it
  std::set<Stream*> streams, unjoined;
  bool is_invalid = false;
};

// A copy between pinned and device memory that a GPU may not have made yet. The numbers of one to
// the host arrive when the host waits for it. The source of one to the device must stay as it is.
struct PendingCopy {
  void* target;
  const void* source;
  std::vector<char> bytes;
  bool to_host;
  unsigned long long position;  // in its stream
};

struct Stream {
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  Capture* capture = nullptr;
  unsigned long long position = 0;
  std::vector<PendingCopy> pending;
};

constexpr int MAX_DEVICES = 16;
extern std::recursive_mutex lock;
extern std::set<Stream*> streams;
extern std::set<Capture*> captures;
extern std::set<Graph*> graphs;
extern Stream legacy[MAX_DEVICES];
extern thread_local int device;
extern thread_local cudaStreamCaptureMode mode;

cudaError_t finish(cudaError_t error, const char* function);
const char* name(cudaError_t error);
const void* this_thread();

// Settings, from the environment.
int device_count();
int capability();  // 90 for 9.0
int shared_memory();
size_t memory_size();
bool is_traced();

bool is_legacy(cudaStream_t handle);
bool is_stream(cudaStream_t handle);
Stream* find(cudaStream_t handle);
// Ends what is pending in a stream up to a position, or in all streams of a device.
void complete(Stream* stream, unsigned long long position = ~0ull);
void complete_device(int device);
// cudaSuccess where a call that may synchronize is allowed during the captures of the process.
cudaError_t check_unsafe(const char* function);
// Adds an operation to a stream, or to the graph that is captured from it.
cudaError_t enqueue(cudaStream_t handle, const char* operation);

}  // namespace simulated
