/* Makes recorded calls without Python, under sanitizers: layouts, tokens, failures, clocks. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "replay.c"

enum { COLUMNS = 7, CALLS = 5 };

static int fails_at = -1, made_calls;

/* Adds 1 to every number of its tensor; fails, or returns 1, where it is told to. */
static int add_one(void *self, const Any *args, int32_t count, Any *result) {
  const Tensor *tensor = tensor_of(args);
  if (count != 1 || made_calls++ == fails_at) {
    if (self == NULL) return -1;
    result->kind = KIND_INT;
    result->value.number = 1;
    return 0;
  }
  float *data = data_of(tensor);
  for (int column = 0; column < COLUMNS; ++column) data[column] += 1;
  return 0;
}

static void expect(int is_right, const char *what) {
  if (is_right) return;
  fprintf(stderr, "replay: %s\n", what);
  exit(2);
}

static Tensor tensor(float *data, int64_t *shape, int64_t *strides, int32_t ndim) {
  Tensor made = {data, 1, 0, ndim, CODE_FLOAT, 32, 1, shape, strides, 0};
  return made;
}

static int64_t run(Part *part, int64_t first, Tensor *token, Tensor *result) {
  Any args[4] = {{KIND_INT, 0, {.pointer = part}}, {KIND_INT, 0, {.number = first}}};
  int32_t count = 2;
  if (first <= 0) args[count++] = (Any){KIND_DLTENSOR, 0, {.pointer = token}};
  args[count++] = (Any){KIND_DLTENSOR, 0, {.pointer = result}};
  Any said;
  expect(__tvm_ffi_replay(NULL, args, count, &said) == 0 && said.kind == KIND_INT, "a call");
  return said.value.number;
}

int main(void) {
  int64_t wide[2] = {1, COLUMNS}, wide_strides[2] = {COLUMNS, 1}, flat[1] = {COLUMNS};
  int64_t one[1] = {1}, two[1] = {2}, clock[2] = {3, 4};
  float *own = calloc(COLUMNS, sizeof *own), *given = calloc(COLUMNS, sizeof *given);
  float *got = calloc(COLUMNS, sizeof *got), *apart = calloc(2 * COLUMNS, sizeof *apart);
  expect(own && given && got && apart, "memory");
  Tensor inside = tensor(own, wide, wide_strides, 2), token = tensor(given, flat, one, 1);
  Tensor result = tensor(got, flat, one, 1), spread = tensor(apart, flat, two, 1);
  Any argument = {KIND_DLTENSOR, 0, {.pointer = &inside}};
  Call calls[CALLS];
  for (int place = 0; place < CALLS; ++place)
    calls[place] = (Call){add_one, place == 1 ? NULL : calls, &argument, 1, 0};
  Part part = {calls, CALLS, &inside, 1, &inside, 1, clock, 2};

  for (int column = 0; column < COLUMNS; ++column) given[column] = (float)column;
  expect(run(&part, STRICT, &token, &result) == DONE && got[2] == 2 + CALLS, "a step");
  expect(clock[0] == 4 && clock[1] == 5, "the clock");
  expect(run(&part, 0, &spread, &result) == -2, "a token with gaps");
  expect(run(&part, 0, &token, &spread) == -3, "a result with gaps");
  for (int column = 0; column < COLUMNS; ++column) {
    given[column] = column % 2 ? INFINITY : NAN;
    expect(run(&part, STRICT, &token, &result) == -2, "a token that is not finite");
    given[column] = (float)column;
  }
  for (fails_at = 0; fails_at < CALLS; ++fails_at) {
    made_calls = 0;
    expect(run(&part, 0, &token, &result) == fails_at, "the place of a failure");
    expect(made_calls == fails_at + 1 && clock[0] == 4, "what was done before it");
    fails_at += CALLS;
    expect(run(&part, fails_at - CALLS + 1, NULL, &result) == DONE, "going on");
    fails_at -= CALLS;
    expect(got[2] == 2 + CALLS - 1 && clock[0]-- == 5 && clock[1]--, "what was done behind it");
  }
  int64_t square[2] = {2, 3}, across[2] = {1, 2}, along[2] = {3, 1}, none[2] = {0, 3};
  Tensor turned = tensor(given, square, across, 2), straight = tensor(got, square, along, 2);
  Any pair[2] = {{KIND_DLTENSOR, 0, {.pointer = &turned}}, {KIND_DLTENSOR, 0, {.pointer = &straight}}};
  expect(__tvm_ffi_copy(NULL, pair, 2, NULL) == 0 && got[1] == 2 && got[3] == 1, "a copy");
  straight.shape = none;
  expect(__tvm_ffi_copy(NULL, pair, 2, NULL) == -1, "a copy of other sizes");
  free(own), free(given), free(got), free(apart);
  puts("replay: as it should be");
  return 0;
}
