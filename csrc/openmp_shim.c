/* The services that a kernel compiled by TVM asks of its runtime, through OpenMP.
 *
 * A kernel library that this file is linked into needs no TVM runtime. PyTorch has loaded its own
 * libgomp before, so kernels and PyTorch share one pool of threads.
 */
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum {
  ALIGNMENT = 64,
  KEPT_BLOCKS = 8,
  KEPT_BYTES = 8 << 20, /* of one thread */
};

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Group;

typedef int (*Task)(int task_id, Group *group, void *closure);


static int parallel_launch(Task task, void *closure, int num_task) {
  int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (num_task > 0 && num_task < threads) threads = num_task;
  if (threads <= 1) {
    Group alone = {NULL, 1};
    return task(0, &alone, closure);
  }
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Group group = {NULL, omp_get_num_threads()};
    if (task(omp_get_thread_num(), &group, closure) != 0) {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed ? -1 : 0;
}

static int parallel_barrier(int task_id, Group *group) {
  (void)task_id, (void)group;
#pragma omp barrier
  return 0;
}

/* What a kernel gives back is kept for the next call of the same thread, and freed when the thread
 * ends. A block begins with its size, ALIGNMENT bytes before what the kernel sees of it.
 */
typedef struct {
  size_t size;
} Block;

typedef struct {
  Block *blocks[KEPT_BLOCKS];
  size_t bytes;
  int watched; /* 1: freed when the thread ends, -1: can't be, so nothing is kept */
} Kept;

static __thread Kept kept;

/* glibc's way to run a destructor of a thread; it keeps this library loaded until then. */
extern int __cxa_thread_atexit_impl(void (*run)(void *), void *argument, void *library)
    __attribute__((weak));
extern void *__dso_handle __attribute__((visibility("hidden")));

static void free_kept(void *argument) {
  Kept *own = argument;
  for (int place = 0; place < KEPT_BLOCKS; ++place) {
    free(own->blocks[place]);
    own->blocks[place] = NULL;
  }
  own->bytes = 0;
  own->watched = -1;
}

static int keeps(Kept *own) {
  if (own->watched == 0) {
    int failed = !__cxa_thread_atexit_impl ||
                 __cxa_thread_atexit_impl(free_kept, own, &__dso_handle) != 0;
    own->watched = failed ? -1 : 1;
  }
  return own->watched > 0;
}

/* The smallest kept block that is large enough, or, for no bytes at all, the smallest. */
static int smallest(const Kept *own, size_t bytes) {
  int found = -1;
  for (int place = 0; place < KEPT_BLOCKS; ++place) {
    const Block *block = own->blocks[place];
    if (block && block->size >= bytes &&
        (found < 0 || block->size < own->blocks[found]->size))
      found = place;
  }
  return found;
}

static Block *take(Kept *own, int place) {
  Block *block = own->blocks[place];
  own->blocks[place] = NULL;
  own->bytes -= block->size;
  return block;
}

static void *alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  if (bytes > SIZE_MAX / 2) return NULL;
  size_t size = ((size_t)bytes / ALIGNMENT + 1) * ALIGNMENT;
  int place = smallest(&kept, size);
  Block *block = place < 0 ? aligned_alloc(ALIGNMENT, ALIGNMENT + size) : take(&kept, place);
  if (!block) return NULL;
  if (place < 0) block->size = size;
  return (char *)block + ALIGNMENT;
}

static int free_workspace(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  if (!memory) return 0;
  Block *block = (Block *)(void *)((char *)memory - ALIGNMENT);
  if (block->size > KEPT_BYTES || !keeps(&kept)) {
    free(block);
    return 0;
  }
  int empty = 0;
  while (empty < KEPT_BLOCKS && kept.blocks[empty]) ++empty;
  while (empty == KEPT_BLOCKS || kept.bytes + block->size > KEPT_BYTES) {
    empty = smallest(&kept, 0); /* large blocks cost more to get */
    free(take(&kept, empty));
  }
  kept.blocks[empty] = block;
  kept.bytes += block->size;
  return 0;
}

/* TVM declares these slots weak and empty in every kernel library; here they are filled. */
int (*__TVMBackendParallelLaunch)(Task, void *, int) = parallel_launch;
int (*__TVMBackendParallelBarrier)(int, Group *) = parallel_barrier;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = free_workspace;

typedef int (*RegisterSymbol)(const char *name, void *symbol);

/* Makes kernels that are loaded from now on use this file's services; 0 when it worked. */
__attribute__((visibility("default"))) int bincompile_register_openmp(RegisterSymbol add) {
  return add("__TVMBackendParallelLaunch", (void *)parallel_launch) ||
         add("__TVMBackendParallelBarrier", (void *)parallel_barrier) ||
         add("__TVMBackendAllocWorkspace", (void *)alloc_workspace) ||
         add("__TVMBackendFreeWorkspace", (void *)free_workspace);
}
