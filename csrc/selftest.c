/* Runs the native parts without Python: under sanitizers, under valgrind, on an emulated machine.
 *
 *     selftest services THREADS ROUNDS   the shim's services, from many threads at once
 *     selftest run KERNEL CALL RESULT    one call of a kernel library, its tensors at guard pages
 *
 * CALL holds, in the order of the machine: the function's name (its length before it), the number
 * of arguments, and for each a letter: n(one), i(nteger) and f(loat) of 8 bytes, or t(ensor) with
 * code, bits, dimensions, shape, strides, side, alignment, bytes and data. A tensor of side 1 ends
 * where a page begins that can't be touched, one of side 0 begins where such a page ends. RESULT
 * gets what the function returned, and the tensors as the call left them. tests/native.py writes
 * and reads. Kernels are linked without the shim: they find this program's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum { MOST_ARGUMENTS = 64, MOST_DIMENSIONS = 8, WORKSPACE_ALIGNMENT = 64 };

/* The slots of the shim that this program is linked with. */
typedef int (*Task)(int task_id, void *group, void *closure);
extern int (*__TVMBackendParallelLaunch)(Task, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);

static void fail(const char *what, const char *which) {
  fprintf(stderr, "selftest: %s: %s\n", what, which ? which : "");
  exit(2);
}

/* Kernels report a wrong argument through this. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "selftest: %s: ", kind);
  for (int32_t part = 0; part < count; ++part) fputs(parts[part] ? parts[part] : "", stderr);
  fputc('\n', stderr);
}

static size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

/* Memory between two pages that can't be touched. */
static void *guarded(size_t bytes, size_t alignment, int at_end) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = up(bytes ? bytes : 1, page);
  char *start = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + page, inside, PROT_READ | PROT_WRITE) != 0)
    fail("no memory", "mmap");
  memset(start + page, 0xA5, inside); /* what is read before it was written shows */
  return start + page + (at_end ? inside - up(bytes, alignment) : 0);
}

static void *guarded_workspace(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return guarded((size_t)bytes, WORKSPACE_ALIGNMENT, 1);
}

static int kept_workspace(int type, int id, void *memory) {
  (void)type, (void)id, (void)memory; /* the process ends after one call */
  return 0;
}

static void get(FILE *file, void *into, size_t bytes) {
  if (bytes && fread(into, bytes, 1, file) != 1) fail("the call ends early", NULL);
}

static int64_t get_integer(FILE *file) {
  int64_t value;
  get(file, &value, sizeof value);
  return value;
}

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
  size_t bytes;
} Argument;

static void get_tensor(FILE *file, Argument *to) {
  DLTensor *tensor = &to->tensor;
  memset(tensor, 0, sizeof *tensor);
  tensor->device.device_type = kDLCPU;
  tensor->dtype.code = (uint8_t)get_integer(file);
  tensor->dtype.bits = (uint8_t)get_integer(file);
  tensor->dtype.lanes = 1;
  tensor->ndim = (int32_t)get_integer(file);
  if (tensor->ndim > MOST_DIMENSIONS) fail("too many dimensions", NULL);
  for (int32_t axis = 0; axis < tensor->ndim; ++axis) to->shape[axis] = get_integer(file);
  for (int32_t axis = 0; axis < tensor->ndim; ++axis) to->strides[axis] = get_integer(file);
  tensor->shape = to->shape;
  tensor->strides = to->strides;
  int at_end = get_integer(file) != 0;
  size_t alignment = (size_t)get_integer(file);
  to->bytes = (size_t)get_integer(file);
  tensor->data = guarded(to->bytes, alignment, at_end);
  get(file, tensor->data, to->bytes);
}

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) fail("no symbol", name);
  return found;
}

static int run(const char *kernel, const char *call, const char *result) {
  static Argument held[MOST_ARGUMENTS];
  TVMFFIAny given[MOST_ARGUMENTS], returned;
  memset(given, 0, sizeof given);
  memset(&returned, 0, sizeof returned);
  void *library = dlopen(kernel, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("can't load", dlerror());
  __TVMBackendAllocWorkspace = guarded_workspace;
  __TVMBackendFreeWorkspace = kept_workspace;
  FILE *in = fopen(call, "rb"), *out = fopen(result, "wb");
  if (!in || !out) fail("can't open", in ? result : call);
  char name[256] = "__tvm_ffi_";
  size_t length = (size_t)get_integer(in), begin = strlen(name);
  if (length + begin >= sizeof name) fail("a name that is too long", NULL);
  get(in, name + begin, length);
  int32_t count = (int32_t)get_integer(in);
  if (count > MOST_ARGUMENTS) fail("too many arguments", name);
  for (int32_t place = 0; place < count; ++place) {
    char letter;
    get(in, &letter, 1);
    held[place].tensor.data = NULL;
    if (letter == 't') {
      get_tensor(in, &held[place]);
      given[place].type_index = kTVMFFIDLTensorPtr;
      given[place].v_ptr = &held[place].tensor;
    } else if (letter != 'n') {
      given[place].type_index = letter == 'i' ? kTVMFFIInt : kTVMFFIFloat;
      get(in, &given[place].v_int64, sizeof given[place].v_int64);
    }
  }
  TVMFFISafeCallType function = (TVMFFISafeCallType)symbol(library, name);
  if (function(NULL, given, count, &returned) != 0) fail("the kernel refused", name);
  int64_t value = returned.type_index == kTVMFFINone ? 0 : returned.v_int64;
  int good = fwrite(&value, sizeof value, 1, out) == 1;
  for (int32_t place = 0; place < count; ++place)
    if (held[place].tensor.data && held[place].bytes)
      good &= fwrite(held[place].tensor.data, held[place].bytes, 1, out) == 1;
  return fclose(in) || fclose(out) || !good;
}

typedef struct {
  int64_t *sums; /* one of each task */
  int rounds, nested;
} Work;

static const uint64_t SIZES[] = {0, 1, 63, 64, 65, 4096, 100000, 1 << 20, 3 << 20, 9 << 20};
enum { SIZE_COUNT = sizeof SIZES / sizeof *SIZES, HELD = 12, MOST_THREADS = 64 };

static int task(int task_id, void *group, void *closure) {
  Work *work = closure;
  void *blocks[HELD] = {NULL};
  unsigned random = (unsigned)task_id * 2654435761u + 1;
  (void)group;
  for (int round = 0; round < work->rounds; ++round) {
    random = random * 1664525u + 1013904223u;
    int place = (int)(random >> 16) % HELD;
    uint64_t bytes = SIZES[(random >> 8) % SIZE_COUNT];
    if (blocks[place] && __TVMBackendFreeWorkspace(1, 0, blocks[place]) != 0) return -1;
    unsigned char *fresh = blocks[place] = __TVMBackendAllocWorkspace(1, 0, bytes, 2, 32);
    if (!fresh || (uintptr_t)fresh % WORKSPACE_ALIGNMENT) return -1;
    if (bytes) fresh[0] = fresh[bytes - 1] = (unsigned char)place;
    for (int other = 0; other < HELD; ++other)
      if (other != place && blocks[other] == (void *)fresh) return -1;
    work->sums[task_id] += (int64_t)bytes;
  }
  for (int place = 0; place < HELD; ++place)
    if (blocks[place] && __TVMBackendFreeWorkspace(1, 0, blocks[place]) != 0) return -1;
  if (work->nested) {
    int64_t sums[MOST_THREADS] = {0};
    Work inner = {sums, 3, 0};
    if (__TVMBackendParallelLaunch(task, &inner, 0) != 0) return -1;
  }
  return 0;
}

static int refuse(int task_id, void *group, void *closure) {
  (void)group, (void)closure;
  return task_id == 0 ? -1 : 0;
}

static void *caller(void *argument) {
  int rounds = *(int *)argument;
  int64_t total = 0;
  for (int round = 0; round < rounds; ++round) {
    int64_t sums[MOST_THREADS] = {0};
    Work work = {sums, 40, round % 2};
    if (__TVMBackendParallelLaunch(task, &work, round % 4) != 0) fail("a launch failed", NULL);
    if (__TVMBackendParallelLaunch(refuse, NULL, 0) == 0) fail("a failure was lost", NULL);
    for (int place = 0; place < MOST_THREADS; ++place) total += sums[place];
  }
  if (!total) fail("nothing was done", NULL);
  return NULL;
}

static int services(int threads, int rounds) {
  pthread_t callers[MOST_THREADS];
  if (threads < 1 || threads > MOST_THREADS) fail("1 to 64 threads", NULL);
  for (int pass = 0; pass < 2; ++pass) { /* threads end and others begin */
    for (int place = 0; place < threads; ++place)
      if (pthread_create(&callers[place], NULL, caller, &rounds)) fail("no thread", NULL);
    for (int place = 0; place < threads; ++place) pthread_join(callers[place], NULL);
  }
  caller(&rounds);
  puts("services: as they should be");
  return 0;
}

int main(int count, char **values) {
  omp_set_dynamic(0);
  if (count == 4 && strcmp(values[1], "services") == 0)
    return services(atoi(values[2]), atoi(values[3]));
  if (count == 5 && strcmp(values[1], "run") == 0) return run(values[2], values[3], values[4]);
  fail("usage", "services THREADS ROUNDS | run KERNEL CALL RESULT");
}
