// Streams, events and captures of the simulated CUDA runtime, with CUDA's rules for captures:
// docs.nvidia.com, CUDA programming guide, "Prohibited and Unhandled Operations".
#include <chrono>

#include "state.h"

namespace simulated {

std::set<Stream*> streams;
std::set<Capture*> captures;
Stream legacy[MAX_DEVICES];
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

struct Event {
  int device;
  unsigned flags;
  Stream* stream = nullptr;
  unsigned long long position = 0;
  Capture* capture = nullptr;
  unsigned long long capture_id = 0;
  double seconds = 0;
};
static std::set<Event*> events;
static unsigned long long next_capture = 1;

bool is_legacy(cudaStream_t handle) { return size_t(handle) <= 2; }
bool is_stream(cudaStream_t handle) {
  return is_legacy(handle) || streams.count((Stream*)handle);
}
Stream* find(cudaStream_t handle) {
  if (!is_legacy(handle)) return (Stream*)handle;
  legacy[device].device = device;
  return &legacy[device];
}

cudaError_t check_unsafe(const char* function) {
  if (mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* capture : captures) {
    bool is_own = capture->thread == this_thread();
    bool forbids = capture->mode == cudaStreamCaptureModeGlobal
        ? is_own || mode == cudaStreamCaptureModeGlobal
        : capture->mode == cudaStreamCaptureModeThreadLocal && is_own;
    if (!forbids) continue;
    capture->is_invalid = true;
    fprintf(stderr, "[simulated] %s is forbidden during a capture\n", function);
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

// The legacy stream waits for all blocking streams, which one that is captured cannot be.
static Capture* capture_of_blocking_stream() {
  for (Capture* capture : captures)
    for (Stream* stream : capture->streams)
      if (stream->device == device && !(stream->flags & cudaStreamNonBlocking)) return capture;
  return nullptr;
}

cudaError_t enqueue(cudaStream_t handle, const char* operation) {
  LOCK;
  if (is_traced()) fprintf(stderr, "[simulated] %.150s\n", operation);
  if (!is_stream(handle)) return cudaErrorInvalidResourceHandle;
  Stream* stream = find(handle);
  if (Capture* capture = stream->capture) {
    if (capture->is_invalid) return cudaErrorStreamCaptureInvalidated;
    capture->graph->nodes.push_back(operation);
    return cudaSuccess;
  }
  if (is_legacy(handle))
    if (Capture* capture = capture_of_blocking_stream()) {
      capture->is_invalid = true;
      return cudaErrorStreamCaptureImplicit;
    }
  ++stream->position;
  return cudaSuccess;
}

static cudaError_t wait(cudaStream_t handle, const char* function) {
  CHECK(check_unsafe(function));
  if (!is_stream(handle)) return cudaErrorInvalidResourceHandle;
  if (Capture* capture = find(handle)->capture) {
    capture->is_invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  CHECK(enqueue(handle, function));
  if (is_legacy(handle)) complete_device(device);
  else complete(find(handle));
  return cudaSuccess;
}

static cudaError_t wait(Event* event) {
  if (!events.count(event)) return cudaErrorInvalidResourceHandle;
  if (event->capture) {
    if (captures.count(event->capture)) event->capture->is_invalid = true;
    return cudaErrorCapturedEvent;
  }
  bool is_known = streams.count(event->stream) ||
      (event->stream >= legacy && event->stream < legacy + MAX_DEVICES);
  if (event->stream && is_known) complete(event->stream, event->position);
  return cudaSuccess;
}

}  // namespace simulated

using namespace simulated;

EXPORT int simulated_enqueue(cudaStream_t stream, const char* operation) {
  return finish(enqueue(stream, operation), operation);
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int level) {
  LOCK;
  Stream* made = new Stream();
  made->device = device, made->flags = flags, made->priority = level;
  streams.insert(made);
  *stream = cudaStream_t(made);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  LOCK;
  complete(find(stream));
  streams.erase((Stream*)stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* level) {
  return *level = find(stream)->priority, cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  LOCK;
  FINISH(wait(stream, __func__));
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  LOCK;
  FINISH(wait(stream, __func__));
}
EXPORT cudaError_t cudaStreamAddCallback(
    cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  CHECK(enqueue(stream, __func__));
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  CHECK(enqueue(stream, __func__));
  function(data);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCK;
  if (!is_stream(handle)) FINISH(cudaErrorInvalidResourceHandle);
  Capture* capture = find(handle)->capture;
  *status = !capture           ? cudaStreamCaptureStatusNone
      : capture->is_invalid    ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (is_legacy(handle) && capture_of_blocking_stream()) FINISH(cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
    size_t* count) {
  LOCK;
  CHECK(cudaStreamIsCapturing(handle, status));
  if (Capture* capture = find(handle)->capture) {
    if (id) *id = capture->id;
    if (graph) *graph = cudaGraph_t(capture->graph);
  }
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode kind) {
  LOCK;
  if (is_legacy(handle)) FINISH(cudaErrorStreamCaptureUnsupported);
  if (!is_stream(handle)) FINISH(cudaErrorInvalidResourceHandle);
  Stream* stream = find(handle);
  if (stream->capture) FINISH(cudaErrorIllegalState);
  Capture* capture = new Capture{new Graph(), kind, next_capture++, stream, this_thread()};
  capture->streams.insert(stream);
  stream->capture = capture;
  captures.insert(capture);
  graphs.insert(capture->graph);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCK;
  *graph = nullptr;
  Stream* stream = find(handle);
  Capture* capture = stream->capture;
  if (!capture) FINISH(cudaErrorIllegalState);
  if (capture->origin != stream) FINISH(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != this_thread())
    FINISH(cudaErrorStreamCaptureWrongThread);
  for (Stream* other : capture->streams) other->capture = nullptr;
  captures.erase(capture);
  if (capture->is_invalid) FINISH(cudaErrorStreamCaptureInvalidated);
  if (!capture->unjoined.empty()) FINISH(cudaErrorStreamCaptureUnjoined);
  *graph = cudaGraph_t(capture->graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  LOCK;
  Event* made = new Event{device, flags};
  events.insert(made);
  *event = cudaEvent_t(made);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  LOCK;
  events.erase((Event*)event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  LOCK;
  CHECK(enqueue(stream_handle, __func__));
  Event* event = (Event*)handle;
  Stream* stream = find(stream_handle);
  if (!events.count(event) || event->device != stream->device)
    FINISH(cudaErrorInvalidResourceHandle);
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  event->seconds = std::chrono::duration<double>(now).count();
  event->stream = stream, event->position = stream->position;
  event->capture = stream->capture;
  event->capture_id = stream->capture ? stream->capture->id : 0;
  if (stream->capture) stream->capture->unjoined.erase(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  LOCK;
  CHECK(check_unsafe(__func__));
  FINISH(wait((Event*)event));
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t second) {
  Event *start = (Event*)first, *end = (Event*)second;
  bool is_timed = !((start->flags | end->flags) & cudaEventDisableTiming);
  if (!is_timed || !start->stream || !end->stream) FINISH(cudaErrorInvalidResourceHandle);
  *ms = float((end->seconds - start->seconds) * 1e3);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCK;
  Event* event = (Event*)event_handle;
  if (!is_stream(handle) || !events.count(event)) FINISH(cudaErrorInvalidResourceHandle);
  Stream* stream = find(handle);
  Capture* capture = event->capture;
  if (capture && captures.count(capture) && capture->id == event->capture_id) {
    if (stream->capture && stream->capture != capture) {
      capture->is_invalid = stream->capture->is_invalid = true;
      FINISH(cudaErrorStreamCaptureMerge);
    }
    if (is_legacy(handle)) {
      capture->is_invalid = true;
      FINISH(cudaErrorStreamCaptureImplicit);
    }
    stream->capture = capture;  // a stream that waits for a captured event joins the capture
    capture->streams.insert(stream);
    if (stream != capture->origin) capture->unjoined.insert(stream);
    capture->unjoined.erase(event->stream);
    return cudaSuccess;
  }
  if (capture) FINISH(cudaErrorCapturedEvent);
  if (stream->capture && event->stream) {
    stream->capture->is_invalid = true;
    FINISH(cudaErrorStreamCaptureIsolation);
  }
  FINISH(enqueue(handle, __func__));
}
