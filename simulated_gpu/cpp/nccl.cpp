// The simulated NCCL: processes exchange numbers through memory that they share.
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "library.h"

namespace {

enum Type { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum Operation { SUM, PROD, MAX, MIN, AVG };
constexpr int SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4;
constexpr size_t SLOT = 64 << 20, HEAD = 4096;  // bytes

struct Head {
  std::atomic<int> arrived, generation;
};
struct Comm {
  int size, rank;
  std::string name;
  Head* head;
  char* slot(int index) const { return (char*)head + HEAD + SLOT * index; }
  void wait_for_all() const {
    int generation = head->generation;
    if (++head->arrived == size) {
      head->arrived = 0;
      ++head->generation;
    } else {
      while (head->generation == generation) usleep(50);
    }
  }
};

size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return sizes[type];
}
float widen(unsigned short bits) {
  unsigned wide = unsigned(bits) << 16;
  float value;
  return memcpy(&value, &wide, sizeof value), value;
}
unsigned short narrow(float value) {  // to the nearest bfloat16, ties to even
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
double get(const char* data, int type, size_t i) {
  switch (type) {
    case INT8: return ((signed char*)data)[i];
    case UINT8: return ((unsigned char*)data)[i];
    case INT32: return ((int*)data)[i];
    case UINT32: return ((unsigned*)data)[i];
    case INT64: return ((long*)data)[i];
    case UINT64: return ((unsigned long*)data)[i];
    case FLOAT16: return ((_Float16*)data)[i];
    case FLOAT32: return ((float*)data)[i];
    case FLOAT64: return ((double*)data)[i];
    default: return widen(((unsigned short*)data)[i]);
  }
}
void put(char* data, int type, size_t i, double value) {
  switch (type) {
    case INT8: ((signed char*)data)[i] = value; break;
    case UINT8: ((unsigned char*)data)[i] = value; break;
    case INT32: ((int*)data)[i] = value; break;
    case UINT32: ((unsigned*)data)[i] = value; break;
    case INT64: ((long*)data)[i] = value; break;
    case UINT64: ((unsigned long*)data)[i] = value; break;
    case FLOAT16: ((_Float16*)data)[i] = value; break;
    case FLOAT32: ((float*)data)[i] = value; break;
    case FLOAT64: ((double*)data)[i] = value; break;
    default: ((unsigned short*)data)[i] = narrow(value);
  }
}
double combine(int operation, double a, double b) {
  switch (operation) {
    case PROD: return a * b;
    case MAX: return std::max(a, b);
    case MIN: return std::min(a, b);
    default: return a + b;
  }
}

int join(Comm** result, int size, const char* name, int rank) {
  int file = shm_open(name, O_CREAT | O_RDWR, 0600);
  size_t total = HEAD + SLOT * size;
  if (file < 0 || ftruncate(file, total)) return SYSTEM_ERROR;
  void* memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return SYSTEM_ERROR;
  *result = new Comm{size, rank, name, (Head*)memory};
  (*result)->wait_for_all();
  return 0;
}
int leave(Comm* comm) { return shm_unlink(comm->name.c_str()), 0; }

// Shows the bytes of every process to every process, a slot at a time: use(offset, bytes).
template <typename Use>
int exchange(Comm* comm, const void* sent, size_t bytes, cudaStream_t stream, Use use) {
  if (enqueue(stream, "a collective of NCCL")) return 1;
  for (size_t offset = 0; offset < bytes; offset += SLOT) {
    size_t part = std::min(SLOT, bytes - offset);
    if (sent) memcpy(comm->slot(comm->rank), (const char*)sent + offset, part);
    comm->wait_for_all();
    use(offset, part);
    comm->wait_for_all();
  }
  return 0;
}

}  // namespace

struct UniqueId {
  char name[128];
};
EXPORT int ncclGetVersion(int* version) { return *version = 22809, 0; }
EXPORT const char* ncclGetErrorString(int) { return "an error of the simulated NCCL"; }
EXPORT const char* ncclGetLastError(Comm*) { return ""; }
EXPORT int ncclGetUniqueId(UniqueId* id) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  memset(id, 0, sizeof *id);
  std::string name =
      "/simulated-nccl-" + std::to_string(getpid()) + "-" + std::to_string(now.tv_nsec);
  return name.copy(id->name, sizeof id->name - 1), 0;
}
EXPORT int ncclCommInitRank(Comm** comm, int size, UniqueId id, int rank) {
  return join(comm, size, id.name, rank);
}
EXPORT int ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, void*) {
  return join(comm, size, id.name, rank);
}
EXPORT int ncclCommInitRankScalable(
    Comm** comm, int size, int rank, int, UniqueId* ids, void*) {
  return join(comm, size, ids->name, rank);
}
EXPORT int ncclCommSplit(Comm* comm, int, int, Comm** part, void*) {  // into one part
  static int splits = 0;
  std::string name = comm->name + "-" + std::to_string(splits++);
  return join(part, comm->size, name.c_str(), comm->rank);
}
EXPORT int ncclCommCount(Comm* comm, int* size) { return *size = comm->size, 0; }
EXPORT int ncclCommUserRank(Comm* comm, int* rank) { return *rank = comm->rank, 0; }
EXPORT int ncclCommGetAsyncError(Comm*, int* error) { return *error = 0; }
EXPORT int ncclCommDestroy(Comm* comm) { return leave(comm); }
EXPORT int ncclCommAbort(Comm* comm) { return leave(comm); }
EXPORT int ncclRedOpCreatePreMulSum(int*, void*, int, int, Comm*) { return INVALID_ARGUMENT; }

EXPORT int ncclAllReduce(
    const void* sent, char* received, size_t count, int type, int operation, Comm* comm,
    cudaStream_t stream) {
  size_t size = size_of(type);
  return exchange(comm, sent, count * size, stream, [&](size_t offset, size_t bytes) {
    for (size_t i = 0; i < bytes / size; ++i) {
      double value = get(comm->slot(0), type, i);
      for (int rank = 1; rank < comm->size; ++rank)
        value = combine(operation, value, get(comm->slot(rank), type, i));
      put(received + offset, type, i, operation == AVG ? value / comm->size : value);
    }
  });
}
EXPORT int ncclReduceScatter(
    const void* sent, char* received, size_t count, int type, int operation, Comm* comm,
    cudaStream_t stream) {
  size_t bytes = count * size_of(type);
  std::vector<char> all(bytes * comm->size);
  int error =
      ncclAllReduce(sent, all.data(), count * comm->size, type, operation, comm, stream);
  memcpy(received, all.data() + bytes * comm->rank, bytes);
  return error;
}
EXPORT int ncclAllGather(
    const void* sent, char* received, size_t count, int type, Comm* comm, cudaStream_t stream) {
  size_t all = count * size_of(type);
  return exchange(comm, sent, all, stream, [&](size_t offset, size_t bytes) {
    for (int rank = 0; rank < comm->size; ++rank)
      memcpy(received + all * rank + offset, comm->slot(rank), bytes);
  });
}
EXPORT int ncclBroadcast(
    const void* sent, char* received, size_t count, int type, int root, Comm* comm,
    cudaStream_t stream) {
  const void* own = comm->rank == root ? sent : nullptr;
  return exchange(comm, own, count * size_of(type), stream, [&](size_t offset, size_t bytes) {
    memcpy(received + offset, comm->slot(root), bytes);
  });
}
