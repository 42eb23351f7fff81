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
enum { CODE_FLOAT = 2, CODE_BFLOAT = 4 };
enum { DONE = -1, STRICT = -1 };

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

/* `tokens` are copied into the tensors `staged` first, `made` to the results last; then each of the
 * `rows` numbers of `clock` is one more.
 */
typedef struct {
  const Call *calls;
  int64_t count;
  const Tensor *staged;
  int64_t tokens;
  const Tensor *made;
  int64_t results;
  int64_t *clock;
  int64_t rows;
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

/* The first axis from this one on whose size is not 1. */
static int32_t wide_axis(const Tensor *tensor, int32_t axis) {
  while (axis < tensor->ndim && tensor->shape[axis] == 1) ++axis;
  return axis;
}

/* Whether both have the same type, and elements in the same order in memory: the same sizes and
 * strides, axes of size 1 left out.
 */
static int same_layout(const Tensor *left, const Tensor *right) {
  if (left->device_type != right->device_type || left->code != right->code ||
      left->bits != right->bits || left->lanes != right->lanes || !left->strides)
    return 0;
  int32_t i = wide_axis(left, 0), j = wide_axis(right, 0);
  while (i < left->ndim && j < right->ndim) {
    if (left->shape[i] != right->shape[j] || left->strides[i] != right->strides[j]) return 0;
    i = wide_axis(left, i + 1);
    j = wide_axis(right, j + 1);
  }
  return i == left->ndim && j == right->ndim;
}

static void *data_of(const Tensor *tensor) { return (char *)tensor->data + tensor->byte_offset; }

/* Whether all numbers are finite, eight bytes at a time: one more in an exponent that is all ones
 * goes over into the bit of the sign.
 */
static int is_finite(const Tensor *tensor) {
  uint64_t ones = 0x7c007c007c007c00, one = 0x0400040004000400, sign = 0x8000800080008000;
  if (tensor->code == CODE_BFLOAT) {
    ones = 0x7f807f807f807f80, one = 0x0080008000800080;
  } else if (tensor->code != CODE_FLOAT) {
    return 1;
  } else if (tensor->bits == 32) {
    ones = 0x7f8000007f800000, one = 0x0080000000800000, sign = 0x8000000080000000;
  } else if (tensor->bits == 64) {
    ones = 0x7ff0000000000000, one = 0x0010000000000000, sign = 0x8000000000000000;
  }
  const char *data = data_of(tensor);
  int64_t bytes = bytes_of(tensor), place = 0;
  uint64_t found = 0, word = 0;
  for (; place + 8 <= bytes; place += 8) {
    memcpy(&word, data + place, 8);
    found |= (word & ones) + one;
  }
  word = 0;
  if (place < bytes) memcpy(&word, data + place, (size_t)(bytes - place));
  found |= (word & ones) + one;
  return !(found & sign);
}

static void copy(const Tensor *to, const Tensor *from) {
  int64_t bytes = bytes_of(to);
  if (bytes > 0) memcpy(data_of(to), data_of(from), (size_t)bytes);
}

/* Arguments: the part, the first call to make, then the tokens if that is 0, then where results go.
 * The first call can also be STRICT: 0, and tokens have to be finite. Gives DONE when all is done,
 * the place of a call that failed or returned something else than before, or -2 - n for a token or
 * result n that is not laid out as recorded, or a token that is not finite; nothing was done then.
 */
__attribute__((visibility("default"))) int __tvm_ffi_replay(void *self, const Any *args,
                                                             int32_t count, Any *result) {
  (void)self;
  result->kind = KIND_INT;
  result->padding = 0;
  const Part *part = args[0].value.pointer;
  int64_t first = args[1].value.number, tokens = first > 0 ? 0 : part->tokens;
  int strict = first == STRICT;
  if (strict) first = 0;
  const Any *given = args + 2;
  result->value.number = -2;
  if (count != 2 + tokens + part->results) return 0;
  for (int64_t place = 0; place < tokens + part->results; ++place) {
    const Tensor *tensor = tensor_of(given + place);
    const Tensor *wanted = place < tokens ? part->staged + place : part->made + place - tokens;
    result->value.number = -2 - place;
    if (!tensor || !same_layout(tensor, wanted)) return 0;
    if (strict && place < tokens && !is_finite(tensor)) return 0;
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
  for (int64_t row = 0; row < part->rows; ++row) ++part->clock[row];
  result->value.number = DONE;
  return 0;
}

static void copy_axes(const Tensor *from, const Tensor *to, int32_t axis, const char *source,
                      char *place) {
  int64_t bytes = (to->bits + 7) / 8;
  if (axis == to->ndim) {
    memcpy(place, source, (size_t)bytes);
    return;
  }
  int64_t size = to->shape[axis], step = from->strides[axis], stride = to->strides[axis];
  if (axis + 1 == to->ndim && step == 1 && stride == 1) {
    memcpy(place, source, (size_t)(size * bytes));
    return;
  }
  for (int64_t index = 0; index < size; ++index)
    copy_axes(from, to, axis + 1, source + index * step * bytes, place + index * stride * bytes);
}

/* Copies a tensor to another one of the same type and sizes, wherever their elements are. */
__attribute__((visibility("default"))) int __tvm_ffi_copy(void *self, const Any *args,
                                                           int32_t count, Any *result) {
  (void)self, (void)result;
  const Tensor *from = count == 2 ? tensor_of(args) : NULL;
  const Tensor *to = count == 2 ? tensor_of(args + 1) : NULL;
  if (!from || !to || from->ndim != to->ndim || from->bits != to->bits || from->lanes != 1)
    return -1;
  for (int32_t axis = 0; axis < to->ndim; ++axis) {
    if (from->shape[axis] != to->shape[axis]) return -1;
    if (to->shape[axis] == 0) return 0;
  }
  copy_axes(from, to, 0, data_of(from), data_of(to));
  return 0;
}
