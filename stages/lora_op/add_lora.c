/* AddLora, an operator for ONNX Runtime: sum = y + (x·A)·B, with A and B of adapters that are kept here.
 *
 *     y [.., out], x [.., in], adapter [1] -> sum [.., out] (, on a GPU, room for x·A)
 *
 * `adapter_add` and `adapter_site` keep an adapter's A and B under a number; 0 is none, and adds nothing. The
 * runtime's own way, A and B as inputs of every run, reads them in float32 on one core, or copies them to the
 * GPU at every token. There are three of its kind: AddLora and AddLoraExact for the CPU, where y and x are float32,
 * and A and B are kept in int8, with a step for each rank, or in float32, and AddLoraCuda for a GPU, all in float16.
 *
 * stages/lora_op/library.py compiles this file where it runs. The runtime's C interface is a table of functions
 * that only grows at its end, and so is its description of an operator: places and fields are those of
 * onnxruntime_c_api.h of ONNX Runtime 1.21, and its version is what is asked for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* ---- What is used of ONNX Runtime ---- */

enum { API_VERSION = 21 };
typedef void Status; /* null where all went well */
typedef void *const *Api; /* the table of functions */

enum {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  ADD_TO_DOMAIN = 27,
  ADD_DOMAIN = 28,
  GET_DATA = 51,
  COUNT_DIMENSIONS = 61,
  GET_DIMENSIONS = 62,
  GET_SHAPE = 65,
  GET_STRING_ATTRIBUTE = 87,
  GET_INPUT = 90,
  GET_OUTPUT = 91,
  RELEASE_SHAPE = 99,
  GET_GPU_STREAM = 193,
  PARALLEL_FOR = 274
};
enum { FLOAT = 1, INT64 = 7, FLOAT16 = 10 };
enum { ON_CPU = -2, ON_DEVICE = 0 };

typedef struct Operator {
  uint32_t version;
  void *old_create;
  const char *(*name)(const struct Operator *);
  const char *(*provider)(const struct Operator *);
  int (*input_type)(const struct Operator *, size_t);
  size_t (*input_count)(const struct Operator *);
  int (*output_type)(const struct Operator *, size_t);
  size_t (*output_count)(const struct Operator *);
  void *old_compute;
  void (*destroy)(void *);
  int (*input_kind)(const struct Operator *, size_t);
  int (*output_kind)(const struct Operator *, size_t);
  int (*input_memory)(const struct Operator *, size_t);
  void *variadic[4];
  Status *(*create)(const struct Operator *, Api, const void *, void **);
  Status *(*compute)(void *, void *);
  void *infer_shape;
  int (*first_version)(const struct Operator *);
  int (*last_version)(const struct Operator *);
  size_t (*may_in_place)(int **, int **);
  void (*release_may_in_place)(int *, int *);
  size_t (*in_place)(int **, int **);
  void (*release_in_place)(int *, int *);
} Operator;

static Status *status(Api api, const char *message) {
  return ((Status * (*)(int, const char *)) api[CREATE_STATUS])(1, message);
}

/* ---- Adapters ---- */

typedef enum { ROUNDED, EXACT, ON_GPU } Kind; /* of an operator, and of the adapters that it takes */

enum { LANES = 8, WIDE = 4 * LANES, SITES = 4096, NAME = 192, MOST_RANKS = 1024 };
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

/* On the CPU: A in panels of LANES ranks, [rank / LANES][in][LANES], and B in panels of WIDE columns,
 * [out / WIDE][rank][WIDE], filled up with zeros. On a GPU: [in][rank] and [rank][out]. */
typedef struct {
  int64_t in, out, rank; /* rank: a multiple of LANES */
  int rounded;           /* are A and B int8? A quarter of the bytes to read, and decoding waits for bytes */
  float *steps;          /* [rank], of a rank's column of A times that of its row of B; on the CPU */
  void *a, *b;
} Site;

typedef struct Adapter {
  struct Adapter *next;
  int64_t number;
  Kind kind;
  Site sites[SITES];
} Adapter;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Adapter *adapters;
static int64_t last_number;
static struct {
  char name[NAME];
  int64_t kernels; /* that graphs have made for it */
  Kind kind;       /* of the last one */
} projections[SITES];
static int known;

/* Returns the place of a projection, or -1 where there is no more room; `kind` is of a new kernel for it. */
static int place_of(const char *name, const Kind *kind) {
  int place = 0;
  pthread_mutex_lock(&lock);
  while (place < known && strcmp(projections[place].name, name)) place++;
  if (place == SITES || strlen(name) >= NAME)
    place = -1;
  else {
    if (place == known) strcpy(projections[known++].name, name);
    if (kind) projections[place].kernels++, projections[place].kind = *kind;
  }
  pthread_mutex_unlock(&lock);
  return place;
}

/* Returns a projection's name, or null behind the last one, how many kernels graphs have made for it, and the last
 * one's kind. */
const char *projection(int place, int64_t *kernels, int *kind) {
  if (place >= known) return 0;
  *kernels = projections[place].kernels, *kind = projections[place].kind;
  return projections[place].name;
}

static Adapter *find(int64_t number) {
  pthread_mutex_lock(&lock);
  Adapter *found = adapters;
  while (found && found->number != number) found = found->next;
  pthread_mutex_unlock(&lock);
  return found;
}

/* ---- On the CPU ---- */

static inline __attribute__((always_inline)) Lanes get(const void *from, int64_t place, int rounded) {
  if (!rounded) return *(const Lanes *)((const float *)from + place);
  const int8_t *bytes = (const int8_t *)from + place;
#ifdef __AVX2__ /* in two instructions, which gcc 12 does not find */
  return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
#else
  return __builtin_convertvector(*(const Bytes *)bytes, Lanes);
#endif
}

static void put(void *to, int64_t place, float value, int rounded) {
  if (rounded)
    ((int8_t *)to)[place] = lrintf(value);
  else
    ((float *)to)[place] = value;
}

static int64_t bytes_of(const Site *site, int64_t elements) { return elements * (site->rounded ? 1 : 4); }

static int64_t panels_of(const Site *site) { return (site->out + WIDE - 1) / WIDE; }

static void *room_for(const Site *site, int64_t elements) {
  return aligned_alloc(64, (bytes_of(site, elements) + 63) / 64 * 64);
}

/* Returns the step of a rank's numbers, of which the largest becomes 127; 1 where they stay as they are. */
static float step_of(const float *numbers, int64_t count, int64_t apart, int rounded) {
  float most = 0;
  for (int64_t i = 0; rounded && i < count; i++) most = fmaxf(most, fabsf(numbers[i * apart]));
  return most > 0 ? most / 127 : 1;
}

static void *panels_of_a(const float *a, const Site *site, int64_t given, const float *steps) {
  void *panels = room_for(site, site->rank * site->in);
  for (int64_t j = 0; panels && j < site->rank; j++)
    for (int64_t k = 0; k < site->in; k++) {
      float value = j < given ? a[k * given + j] / steps[j] : 0;
      put(panels, (j / LANES * site->in + k) * LANES + j % LANES, value, site->rounded);
    }
  return panels;
}

static void *panels_of_b(const float *b, const Site *site, int64_t given, const float *steps) {
  void *panels = room_for(site, panels_of(site) * WIDE * site->rank);
  for (int64_t n = 0; panels && n < panels_of(site) * WIDE; n++)
    for (int64_t j = 0; j < site->rank; j++) {
      float value = j < given && n < site->out ? b[j * site->out + n] / steps[j] : 0;
      put(panels, (n / WIDE * site->rank + j) * WIDE + n % WIDE, value, site->rounded);
    }
  return panels;
}

enum { BLOCK = 8, MOST_CHUNKS = 64, CHUNK = 64 << 10 }; /* tokens; chunks; bytes of a chunk, for one thread */

typedef struct {
  const Site *site;
  const float *x;
  float *y;
  int64_t tokens, chunks;
  float *partial; /* x·A: [tokens][rank], or what each part of one token's x adds to it, [chunks][rank] */
} Work;

static int64_t chunks_of(int64_t bytes) {
  int64_t chunks = (bytes + CHUNK - 1) / CHUNK;
  return chunks > MOST_CHUNKS ? MOST_CHUNKS : chunks;
}

#define INLINE static inline __attribute__((always_inline)) /* compiled for both */

/* One token's x·A over a part of x. */
INLINE void sum_part_of_x(const Work *work, size_t chunk, int rounded) {
  const Site *site = work->site;
  int64_t from = site->in * chunk / work->chunks, to = site->in * (chunk + 1) / work->chunks;
  for (int64_t j = 0; j < site->rank; j += LANES) {
    int64_t a = j * site->in;
    Lanes sums[4] = {{0}}; /* four, as an addition waits for the one before it */
    int64_t k = from;
    for (; k + 4 <= to; k += 4)
      for (int i = 0; i < 4; i++) sums[i] += get(site->a, a + (k + i) * LANES, rounded) * work->x[k + i];
    for (; k < to; k++) sums[0] += get(site->a, a + k * LANES, rounded) * work->x[k];
    *(Lanes *)(work->partial + chunk * site->rank + j) = (sums[0] + sums[1] + sums[2] + sums[3]) * *(Lanes *)(site->steps + j);
  }
}

static void part_of_x(void *data, size_t chunk) {
  const Work *work = data;
  if (work->site->rounded)
    sum_part_of_x(work, chunk, 1);
  else
    sum_part_of_x(work, chunk, 0);
}

/* Adds low·B, low [rank], to the columns of one panel. */
INLINE void add_panel_as(const Site *site, int64_t panel, const float *low, float *y, int rounded) {
  int64_t b = panel * site->rank * WIDE;
  Lanes sums[4] = {{0}};
  for (int64_t j = 0; j < site->rank; j++)
    for (int i = 0; i < 4; i++) sums[i] += get(site->b, b + j * WIDE + i * LANES, rounded) * low[j];
  int64_t left = site->out - panel * WIDE;
  y += panel * WIDE;
  if (left >= WIDE)
    for (int i = 0; i < 4; i++) *(Lanes *)(y + i * LANES) += sums[i];
  else
    for (int64_t n = 0; n < left; n++) y[n] += sums[n / LANES][n % LANES];
}

static void add_panel(const Site *site, int64_t panel, const float *low, float *y) {
  if (site->rounded)
    add_panel_as(site, panel, low, y, 1);
  else
    add_panel_as(site, panel, low, y, 0);
}

/* One token's low·B for a part of the columns. */
static void part_of_columns(void *data, size_t chunk) {
  const Work *work = data;
  const Site *site = work->site;
  int64_t panels = panels_of(site), from = panels * chunk / work->chunks;
  for (int64_t n = from; n < panels * (int64_t)(chunk + 1) / work->chunks; n++)
    add_panel(site, n, work->partial, work->y);
}

/* x·A of `count` tokens, at most a block, to low, [count][rank]. */
INLINE void multiply_by_a(const Site *site, const float *x, int64_t count, float *low, int rounded) {
  for (int64_t j = 0; j < site->rank; j += LANES) {
    Lanes sums[BLOCK] = {{0}};
    for (int64_t k = 0; k < site->in; k++) {
      Lanes row = get(site->a, j * site->in + k * LANES, rounded);
      if (count == BLOCK)
        for (int t = 0; t < BLOCK; t++) sums[t] += row * x[t * site->in + k];
      else
        for (int64_t t = 0; t < count; t++) sums[t] += row * x[t * site->in + k];
    }
    for (int64_t t = 0; t < count; t++) *(Lanes *)(low + t * site->rank + j) = sums[t] * *(Lanes *)(site->steps + j);
  }
}

/* Both products for a block of tokens: what is read of A and B serves all of them. */
static void block_of_tokens(void *data, size_t block) {
  const Work *work = data;
  const Site *site = work->site;
  int64_t first = block * BLOCK, count = work->tokens - first < BLOCK ? work->tokens - first : BLOCK;
  float *low = work->partial + first * site->rank;
  if (site->rounded)
    multiply_by_a(site, work->x + first * site->in, count, low, 1);
  else
    multiply_by_a(site, work->x + first * site->in, count, low, 0);
  for (int64_t n = 0; n < panels_of(site); n++)
    for (int64_t t = 0; t < count; t++)
      add_panel(site, n, low + t * site->rank, work->y + (first + t) * site->out);
}

typedef void Loop(const void *context, void (*part)(void *, size_t), size_t parts, size_t batches, void *data);

static void in_parallel(Api api, const void *context, void (*part)(void *, size_t), size_t parts, Work *work) {
  if (parts == 1)
    part(work, 0);
  else
    ((Loop *)api[PARALLEL_FOR])(context, part, parts, 0, work);
}

static const char *add_on_cpu(Api api, const void *context, const Site *site, const float *x, float *y,
                              int64_t tokens) {
  int64_t chunks = chunks_of(bytes_of(site, site->in * site->rank)), parts = tokens > 1 ? tokens : chunks;
  float *partial = malloc(parts * site->rank * sizeof(float));
  if (!partial) return "AddLora: out of memory";
  Work work = {site, x, y, tokens, chunks, partial};
  if (tokens > 1)
    in_parallel(api, context, block_of_tokens, (tokens + BLOCK - 1) / BLOCK, &work);
  else {
    in_parallel(api, context, part_of_x, chunks, &work);
    for (int64_t chunk = 1; chunk < chunks; chunk++)
      for (int64_t j = 0; j < site->rank; j++) partial[j] += partial[chunk * site->rank + j];
    work.chunks = chunks_of(bytes_of(site, site->out * site->rank));
    in_parallel(api, context, part_of_columns, work.chunks, &work);
  }
  free(partial);
  return 0;
}

/* ---- On a GPU: by the driver's interface, as the kernels in add_lora.cu are compiled apart ---- */

enum { THREADS = 256, SLICE = 128, TOKENS = 8 }; /* as in add_lora.cu */

static struct {
  void *context, *lower_one, *lower_many, *raise_one, *raise_many;
  int (*set_context)(void *);
  int (*allocate)(uint64_t *, size_t);
  int (*release)(uint64_t);
  int (*upload)(uint64_t, const void *, size_t);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                void **);
} gpu;

/* Loads the compiled kernels of add_lora.cu to the first GPU; returns what went wrong, or null. */
const char *gpu_open(const void *image) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW), *module = 0;
  if (!driver) return "there is no NVIDIA driver";
  int (*init)(unsigned) = dlsym(driver, "cuInit");
  int (*device)(int *, int) = dlsym(driver, "cuDeviceGet");
  int (*retain)(void **, int) = dlsym(driver, "cuDevicePrimaryCtxRetain");
  int (*load)(void **, const void *) = dlsym(driver, "cuModuleLoadData");
  int (*function)(void **, void *, const char *) = dlsym(driver, "cuModuleGetFunction");
  gpu.set_context = dlsym(driver, "cuCtxSetCurrent");
  gpu.allocate = dlsym(driver, "cuMemAlloc_v2");
  gpu.release = dlsym(driver, "cuMemFree_v2");
  gpu.upload = dlsym(driver, "cuMemcpyHtoD_v2");
  gpu.launch = dlsym(driver, "cuLaunchKernel");
  int ordinal;
  if (init(0) || device(&ordinal, 0) || retain(&gpu.context, ordinal)) return "the GPU does not answer";
  if (gpu.set_context(gpu.context) || load(&module, image)) return "the GPU does not take the kernels";
  if (function(&gpu.lower_one, module, "lower_one") || function(&gpu.lower_many, module, "lower_many") ||
      function(&gpu.raise_one, module, "raise_one") || function(&gpu.raise_many, module, "raise_many"))
    return "the kernels are not there";
  return 0;
}

static void *uploaded(const void *from, size_t bytes) {
  uint64_t memory = 0;
  if (gpu.set_context(gpu.context) || gpu.allocate(&memory, bytes)) return 0;
  if (gpu.upload(memory, from, bytes)) {
    gpu.release(memory);
    return 0;
  }
  return (void *)memory;
}

static int slices_of(const Site *site) { return (site->in + SLICE - 1) / SLICE; }

/* `low` has room for [tokens, slices, rank] of float32. */
static const char *add_on_gpu(Api api, const void *context, const Site *site, const void *x, void *y, void *low,
                              int64_t count) {
  void *stream = 0;
  if (((Status * (*)(const void *, void **)) api[GET_GPU_STREAM])(context, &stream))
    return "AddLora: there is no CUDA stream";
  int many = count > 1, tokens = count, in = site->in, out = site->out, rank = site->rank, slices = slices_of(site);
  unsigned tiles = many ? (tokens + TOKENS - 1) / TOKENS : 1, columns = (out + THREADS - 1) / THREADS;
  unsigned shared = rank * sizeof(float) * (many ? TOKENS : 1);
  void *lower[] = {&x, (void *)&site->a, &low, &in, &rank, &tokens};
  void *raise[] = {&low, (void *)&site->b, &y, &slices, &out, &rank, &tokens};
  int failed = gpu.launch(many ? gpu.lower_many : gpu.lower_one, slices, tiles, 1, THREADS, 1, 1, 0, stream, lower, 0);
  if (!failed)
    failed = gpu.launch(many ? gpu.raise_many : gpu.raise_one, columns, tiles, 1, THREADS, 1, 1, shared, stream,
                        raise, 0);
  return failed ? "AddLora: the kernel was not launched" : 0;
}

/* ---- Adapters come and go ---- */

/* Returns the new adapter's number, or 0 without memory. */
int64_t adapter_add(Kind kind) {
  Adapter *adapter = calloc(1, sizeof(Adapter));
  if (!adapter) return 0;
  pthread_mutex_lock(&lock);
  adapter->number = ++last_number;
  adapter->kind = kind;
  adapter->next = adapters;
  adapters = adapter;
  pthread_mutex_unlock(&lock);
  return adapter->number;
}

/* Keeps a copy of A [in, rank] and B [rank, out] for the projection `name`: of float32 for the CPU; of float16,
 * with a rank that is a multiple of 8, for a GPU. Returns what went wrong, or null. */
const char *adapter_site(int64_t number, const char *name, int64_t in, int64_t out, int64_t rank, const void *a,
                         const void *b) {
  Adapter *adapter = find(number);
  int place = place_of(name, 0);
  if (!adapter) return "no such adapter";
  if (place < 0) return "too many projections";
  int on_gpu = adapter->kind == ON_GPU;
  if (on_gpu && (rank % LANES || rank > MOST_RANKS)) return "its rank is too large for the GPU";
  Site *site = &adapter->sites[place];
  site->in = in, site->out = out, site->rank = (rank + LANES - 1) / LANES * LANES;
  site->rounded = adapter->kind == ROUNDED;
  if (on_gpu) {
    site->a = uploaded(a, in * rank * 2), site->b = uploaded(b, rank * out * 2);
    return site->a && site->b ? 0 : "out of memory";
  }
  float *steps = calloc(3 * site->rank, sizeof(float)), *of_a = steps + site->rank, *of_b = of_a + site->rank;
  if (!(site->steps = steps)) return "out of memory";
  for (int64_t j = 0; j < rank; j++) {
    of_a[j] = step_of((const float *)a + j, in, rank, site->rounded);
    of_b[j] = step_of((const float *)b + j * out, out, 1, site->rounded);
    steps[j] = of_a[j] * of_b[j];
  }
  site->a = panels_of_a(a, site, rank, of_a), site->b = panels_of_b(b, site, rank, of_b);
  return site->a && site->b ? 0 : "out of memory";
}

/* Forgets an adapter, with which nothing may run any more. */
void adapter_remove(int64_t number) {
  Adapter *adapter = 0;
  pthread_mutex_lock(&lock);
  for (Adapter **link = &adapters; *link && !adapter;)
    if ((*link)->number == number) {
      adapter = *link;
      *link = adapter->next;
    } else
      link = &(*link)->next;
  pthread_mutex_unlock(&lock);
  if (!adapter) return;
  for (int i = 0; i < SITES; i++) free(adapter->sites[i].steps);
  for (int i = 0; i < SITES; i++)
    for (int which = 0; which < 2; which++) {
      void *memory = which ? adapter->sites[i].b : adapter->sites[i].a;
      if (memory && adapter->kind == ON_GPU)
        gpu.set_context(gpu.context), gpu.release((uint64_t)memory);
      else
        free(memory);
    }
  free(adapter);
}

/* ---- The operator ---- */

typedef struct {
  Api api;
  Kind kind;
  int place;
} Kernel;

enum { MOST_DIMENSIONS = 8 };

typedef struct {
  const void *value;
  void *data;
  size_t dimensions;
  int64_t sizes[MOST_DIMENSIONS], last, rows; /* rows: of `last` elements */
} Tensor;

/* Returns 0, or 1 where the runtime does not give the input. */
static int get_input(Api api, const void *context, size_t place, Tensor *tensor) {
  void *shape = 0;
  if (((Status * (*)(const void *, size_t, const void **)) api[GET_INPUT])(context, place, &tensor->value) ||
      ((Status * (*)(const void *, void **)) api[GET_DATA])(tensor->value, &tensor->data) ||
      ((Status * (*)(const void *, void **)) api[GET_SHAPE])(tensor->value, &shape))
    return 1;
  int failed = ((Status * (*)(const void *, size_t *)) api[COUNT_DIMENSIONS])(shape, &tensor->dimensions) ||
               tensor->dimensions < 1 || tensor->dimensions > MOST_DIMENSIONS ||
               ((Status * (*)(const void *, int64_t *, size_t)) api[GET_DIMENSIONS])(shape, tensor->sizes,
                                                                                    tensor->dimensions);
  ((void (*)(void *))api[RELEASE_SHAPE])(shape);
  if (failed) return 1;
  tensor->last = tensor->sizes[tensor->dimensions - 1], tensor->rows = 1;
  for (size_t i = 0; i + 1 < tensor->dimensions; i++) tensor->rows *= tensor->sizes[i];
  return 0;
}

static int get_output(Api api, void *context, size_t place, const int64_t *sizes, size_t dimensions, void **value) {
  return ((Status * (*)(void *, size_t, const int64_t *, size_t, void **)) api[GET_OUTPUT])(context, place, sizes,
                                                                                          dimensions, value) != 0;
}

static int get_data(Api api, const void *value, void **data) {
  return ((Status * (*)(const void *, void **)) api[GET_DATA])(value, data) != 0;
}

static Status *compute(void *state, void *context) {
  const Kernel *kernel = state;
  Api api = kernel->api;
  Tensor y, x, number;
  void *output = 0, *sum = 0;
  if (get_input(api, context, 0, &y) || get_input(api, context, 1, &x) || get_input(api, context, 2, &number) ||
      get_output(api, context, 0, y.sizes, y.dimensions, &output) || get_data(api, output, &sum))
    return status(api, "AddLora: the runtime does not give its tensors");
  if (sum != y.data) { /* `in_place` asks the runtime for one buffer */
    if (kernel->kind == ON_GPU) return status(api, "AddLora: the sum has a buffer of its own");
    memcpy(sum, y.data, y.rows * y.last * sizeof(float));
  }
  int64_t wanted = *(const int64_t *)number.data;
  if (!wanted || !y.rows) return 0;
  const Adapter *adapter = find(wanted);
  if (!adapter || adapter->kind != kernel->kind) return status(api, "AddLora: no such adapter");
  const Site *site = &adapter->sites[kernel->place];
  if (!site->a) return 0; /* the adapter leaves this projection as it is */
  if (site->in != x.last || site->out != y.last) return status(api, "AddLora: the adapter is of another model");
  const char *wrong;
  if (kernel->kind == ON_GPU) {
    /* an output that nobody reads is memory of the runtime's, for as long as this runs */
    int64_t sizes[] = {y.rows, slices_of(site), site->rank};
    void *value = 0, *low = 0;
    if (get_output(api, context, 1, sizes, 3, &value) || get_data(api, value, &low))
      return status(api, "AddLora: the runtime gives no room for x·A");
    wrong = add_on_gpu(api, context, site, x.data, sum, low, y.rows);
  } else
    wrong = add_on_cpu(api, context, site, x.data, sum, y.rows);
  return wrong ? status(api, wrong) : 0;
}

static const char *rounded_name(const Operator *operator) { return "AddLora"; }
static const char *exact_name(const Operator *operator) { return "AddLoraExact"; }
static const char *gpu_name(const Operator *operator) { return "AddLoraCuda"; }
static const char *cpu_provider(const Operator *operator) { return "CPUExecutionProvider"; }
static const char *gpu_provider(const Operator *operator) { return "CUDAExecutionProvider"; }
static int cpu_type(const Operator *operator, size_t place) { return place == 2 ? INT64 : FLOAT; }
static int gpu_type(const Operator *operator, size_t place) { return place == 2 ? INT64 : FLOAT16; }
static int memory(const Operator *operator, size_t place) { return place == 2 ? ON_CPU : ON_DEVICE; }
static size_t three(const Operator *operator) { return 3; }
static size_t cpu_outputs(const Operator *operator) { return 1; }
static size_t gpu_outputs(const Operator *operator) { return 2; }
static int cpu_output(const Operator *operator, size_t place) { return FLOAT; }
static int gpu_output(const Operator *operator, size_t place) { return place ? FLOAT : FLOAT16; }
static int required(const Operator *operator, size_t place) { return 0; }
static int any_version(const Operator *operator) { return 1; }
static int last_version(const Operator *operator) { return INT32_MAX; }

static size_t in_place(int **inputs, int **outputs) {
  *inputs = calloc(1, sizeof(int)), *outputs = calloc(1, sizeof(int)); /* output 0 in the place of input 0 */
  return *inputs && *outputs ? 1 : 0;
}

static void release(int *inputs, int *outputs) { free(inputs), free(outputs); }

static void destroy(void *kernel) { free(kernel); }

static Status *create(const Operator *operator, Api api, const void *info, void **made) {
  char name[NAME];
  size_t size = NAME;
  if (((Status * (*)(const void *, const char *, char *, size_t *)) api[GET_STRING_ATTRIBUTE])(info, "projection",
                                                                                              name, &size))
    return status(api, "AddLora: its attribute `projection` is missing or too long");
  Kernel *kernel = malloc(sizeof(Kernel));
  if (!kernel) return status(api, "AddLora: out of memory");
  Kind kind = operator->name == gpu_name ? ON_GPU : operator->name == exact_name ? EXACT : ROUNDED;
  *kernel = (Kernel){api, kind, place_of(name, &kind)};
  *made = kernel;
  if (kernel->place >= 0) return 0;
  free(kernel);
  return status(api, "AddLora: too many projections");
}

#define OPERATOR(kind, device)                                                                              \
  {                                                                                                         \
    .version = API_VERSION, .name = kind##_name, .provider = device##_provider, .input_type = device##_type, \
    .input_count = three, .output_type = device##_output, .output_count = device##_outputs, .destroy = destroy,            \
    .input_kind = required, .output_kind = required, .input_memory = memory, .create = create,              \
    .compute = compute, .first_version = any_version, .last_version = last_version, .in_place = in_place,   \
    .release_in_place = release                                                                             \
  }
static const Operator rounded = OPERATOR(rounded, cpu), exact = OPERATOR(exact, cpu), on_gpu = OPERATOR(gpu, gpu);

/* What ONNX Runtime calls when the library is named in a session's options. */
Status *RegisterCustomOps(void *options, const Api *base) {
  Api (*get_api)(uint32_t) = (Api(*)(uint32_t))base[0];
  Api api = get_api(API_VERSION);
  void *domain = 0;
  Status *wrong = ((Status * (*)(const char *, void **)) api[CREATE_DOMAIN])("olive_lab", &domain);
  Status *(*add)(void *, const Operator *) = (Status * (*)(void *, const Operator *)) api[ADD_TO_DOMAIN];
  if (!wrong) wrong = add(domain, &rounded);
  if (!wrong) wrong = add(domain, &exact);
  if (!wrong && gpu.context) wrong = add(domain, &on_gpu);
  return wrong ? wrong : ((Status * (*)(void *, void *)) api[ADD_DOMAIN])(options, domain);
}
