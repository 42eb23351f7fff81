/* The services that a kernel compiled by TVM asks of its runtime, through OpenMP.
 *
 * A kernel library that this file is linked into needs no TVM runtime. PyTorch has loaded its own
 * libgomp before, so kernels and PyTorch share one pool of threads.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

enum { ALIGNMENT = 64 };

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

static void *alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
}

static int free_workspace(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  free(memory);
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
