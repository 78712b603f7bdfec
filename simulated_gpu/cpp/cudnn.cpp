// The simulated cuDNN: descriptors keep what is set, and there is one engine for every graph.
#include "library.h"

// build.py gives the functions below other names here, as cudnn.h declares them with its own types.
#include <cudnn.h>

#include <map>
#include <vector>

struct Handle {
  cudaStream_t stream = nullptr;
};
struct Attribute {
  std::vector<char> bytes;
  long count;
};
struct Descriptor {
  int kind;
  std::map<int, Attribute> attributes;
};
constexpr int EXECUTION_FAILED = 5000;

static size_t size_of(int type) {
  switch (type) {
    case CUDNN_TYPE_BOOLEAN: return 1;
    case CUDNN_TYPE_INT64: case CUDNN_TYPE_DOUBLE: case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_VOID_PTR: case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    default: return 4;
  }
}
template <typename Value>
static void set(Descriptor* descriptor, int name, Value value) {
  const char* bytes = (const char*)&value;
  descriptor->attributes[name] = {std::vector<char>(bytes, bytes + sizeof value), 1};
}

EXPORT int simulated_cudnnCreate(Handle** handle) { return *handle = new Handle(), 0; }
EXPORT int simulated_cudnnDestroy(Handle* handle) { return delete handle, 0; }
EXPORT int simulated_cudnnSetStream(Handle* handle, cudaStream_t stream) {
  return handle->stream = stream, 0;
}
EXPORT int simulated_cudnnGetStream(Handle* handle, cudaStream_t* stream) {
  return *stream = handle->stream, 0;
}
EXPORT size_t simulated_cudnnGetVersion() { return CUDNN_VERSION; }
EXPORT size_t simulated_cudnnGetCudartVersion() { return 13000; }
EXPORT int simulated_cudnnGetProperty(int type, int* value) {
  return *value = type == 0 ? CUDNN_MAJOR : type == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL, 0;
}
EXPORT const char* simulated_cudnnGetErrorString(int) { return "an error of the simulated cuDNN"; }
EXPORT void simulated_cudnnGetLastErrorString(char* text, size_t size) {
  if (size) *text = 0;
}
EXPORT int simulated_cudnnDropoutGetStatesSize(Handle*, size_t* size) { return *size = 1024, 0; }
EXPORT int simulated_cudnnBackendCreateDescriptor(int kind, Descriptor** descriptor) {
  return *descriptor = new Descriptor{kind}, 0;
}
EXPORT int simulated_cudnnBackendDestroyDescriptor(Descriptor* descriptor) {
  return delete descriptor, 0;
}
EXPORT int simulated_cudnnBackendSetAttribute(
    Descriptor* descriptor, int name, int type, long count, const void* values) {
  const char* bytes = (const char*)values;
  size_t size = bytes && count > 0 ? count * size_of(type) : 0;
  descriptor->attributes[name] = {std::vector<char>(bytes, bytes + size), count};
  return 0;
}

static int get_known(
    const Attribute& attribute, int type, long room, long* count, void* values) {
  if (count) *count = attribute.count;
  if (!values || room <= 0) return 0;
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {  // the caller has made the descriptor to fill
    Descriptor *target = *(Descriptor**)values, *source = *(Descriptor**)attribute.bytes.data();
    if (target && source) *target = *source;
  } else {
    long copied = attribute.count < room ? attribute.count : room;
    memcpy(values, attribute.bytes.data(), copied * size_of(type));
  }
  return 0;
}

EXPORT int simulated_cudnnBackendGetAttribute(
    Descriptor* descriptor, int name, int type, long room, long* count, void* values) {
  auto known = descriptor->attributes.find(name);
  if (known != descriptor->attributes.end())
    return get_known(known->second, type, room, count, values);
  long found = 1;
  switch (name) {
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT:
      if (values) *(long*)values = 1;
      break;
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE: case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
      if (values) *(long*)values = 0;
      break;
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
      if (values) *(int*)values = 0;
      break;
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
      if (values && room > 0 && *(Descriptor**)values) {
        Descriptor* engine = new Descriptor{CUDNN_BACKEND_ENGINE_DESCRIPTOR};
        set(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, 0L);
        set(*(Descriptor**)values, CUDNN_ATTR_ENGINECFG_ENGINE, engine);
      }
      break;
    default: found = 0;  // notes, knobs
  }
  if (count) *count = found;
  return 0;
}

EXPORT int simulated_cudnnBackendExecute(Handle* handle, Descriptor*, Descriptor*) {
  return enqueue(handle->stream, "cudnnBackendExecute") ? EXECUTION_FAILED : 0;
}
