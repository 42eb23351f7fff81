/* The calls of one step, recorded with all of their arguments, made again in their order.
 *
 * A call is a function of tvm-ffi's C interface with its arguments; tensors are DLPack's. Both are
 * declared here as far as they are used, with the layouts that those interfaces promise, so that
 * nothing has to be linked. All memory belongs to the caller.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { KIND_NONE = 0, KIND_INT = 1, KIND_DLTENSOR = 7, KIND_TENSOR = 70, TENSOR_HEADER = 24 };

typedef struct {
  int32_t kind;
  uint32_t padding;
  union {
    int64_t number;
    double real;
    void *pointer;
  } value;
} Any;

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef int (*Function)(void *self, const Any *args, int32_t count, Any *result);

typedef struct {
  Function function;
  void *self;
  const Any *args;
  int64_t count;
  int64_t expected; /* what it returned when it was recorded; 0 for nothing */
} Call;

/* `tokens` are copied into the tensors `staged` first, `made` to the results last. */
typedef struct {
  const Call *calls;
  int64_t count;
  const Tensor *staged;
  int64_t tokens;
  const Tensor *made;
  int64_t results;
} Part;

static const Tensor *tensor_of(const Any *given) {
  if (given->kind == KIND_DLTENSOR) return given->value.pointer;
  if (given->kind == KIND_TENSOR)
    return (const Tensor *)(const void *)((const char *)given->value.pointer + TENSOR_HEADER);
  return NULL;
}

static int64_t bytes_of(const Tensor *tensor) {
  int64_t count = 1;
  for (int32_t axis = 0; axis < tensor->ndim; ++axis) count *= tensor->shape[axis];
  return count * ((tensor->bits + 7) / 8) * tensor->lanes;
}

/* Whether both have the same type and sizes, and elements in the same order in memory. */
static int same_layout(const Tensor *left, const Tensor *right) {
  if (left->device_type != right->device_type || left->ndim != right->ndim ||
      left->code != right->code || left->bits != right->bits || left->lanes != right->lanes)
    return 0;
  for (int32_t axis = 0; axis < left->ndim; ++axis) {
    if (left->shape[axis] != right->shape[axis]) return 0;
    if (left->shape[axis] > 1 && left->strides && left->strides[axis] != right->strides[axis])
      return 0;
  }
  return left->strides != NULL || left->ndim == 0;
}

static void *data_of(const Tensor *tensor) { return (char *)tensor->data + tensor->byte_offset; }

static void copy(const Tensor *to, const Tensor *from) {
  int64_t bytes = bytes_of(to);
  if (bytes > 0) memcpy(data_of(to), data_of(from), (size_t)bytes);
}

/* Arguments: the part, the first call to make, then the tokens if that is 0, then where results go.
 * Gives -1 when all is done, the place of a call that failed or returned something else than
 * before, or -2 - n for a token or result n that is not laid out as recorded; nothing was done
 * then.
 */
__attribute__((visibility("default"))) int __tvm_ffi_replay(void *self, const Any *args,
                                                             int32_t count, Any *result) {
  (void)self;
  result->kind = KIND_INT;
  result->padding = 0;
  const Part *part = args[0].value.pointer;
  int64_t first = args[1].value.number, tokens = first ? 0 : part->tokens;
  const Any *given = args + 2;
  if (count != 2 + tokens + part->results) return -1;
  for (int64_t place = 0; place < tokens + part->results; ++place) {
    const Tensor *tensor = tensor_of(given + place);
    const Tensor *wanted = place < tokens ? part->staged + place : part->made + place - tokens;
    result->value.number = -2 - place;
    if (!tensor || !same_layout(tensor, wanted)) return 0;
  }
  for (int64_t place = 0; place < tokens; ++place)
    copy(part->staged + place, tensor_of(given + place));
  for (int64_t place = first; place < part->count; ++place) {
    const Call *call = part->calls + place;
    Any returned = {KIND_NONE, 0, {0}};
    result->value.number = place;
    if (call->function(call->self, call->args, (int32_t)call->count, &returned)) return 0;
    if ((returned.kind == KIND_INT ? returned.value.number : 0) != call->expected) return 0;
  }
  for (int64_t place = 0; place < part->results; ++place)
    copy(tensor_of(given + tokens + place), part->made + place);
  result->value.number = -1;
  return 0;
}
