// A few text tokens against their histories, on the CPU: the arithmetic of layer.py each weight is read once.
// Compiled at run time by native_step.py.
//
// Weights, and keys and values of the cache, are float32 or bfloat16 (widened to float32 as they are read; keys and
// values are rounded as they are written). Activations, weights of adapters and all sums are float32.
//
// Legend: W width, H query heads, G key heads, D head width, F width of the MLP, R tokens, P positions of the pool.
// Types: T of the weights, C of the cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_threads.h"

namespace {

struct Sizes {  // the order of native_step.py
  int64_t width, depth, num_heads, num_kv_heads, head_dim, hidden;
};

struct LowRank {  // the order of native_step.py; down and up are null where a projection has no adapter
  const float *down, *up;
  int64_t rank;
};

struct Group {  // neighbouring tokens that use one LoRA: its number, the first token, tokens
  int64_t lora, first, num;
};

struct Pass {  // the order of native_step.py
  float* h;                // (R, W), in and out
  const float *cos, *sin;  // (R, D)
  void *keys, *values;     // (depth, G, P, D)
  int64_t P;
  const int64_t *first, *at;  // (R,): where the history of a token begins in the pool, and its position in the history
  int64_t R;
  const LowRank* adapters;  // (LoRAs, depth, 4)
  const Group* groups;
  int64_t num_groups;
  int32_t num_threads;
  float eps;
};

template <typename T>
struct Layer {  // the order of native_step.py; norms are float32; q_norm, k_norm may be null
  const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
  const T *qkv, *out, *gate_up, *down;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const uint16_t* from) {  // bfloat16 is the upper half of a float32
  Halves value;
  std::memcpy(&value, from, sizeof value);
  return (Floats)(__builtin_convertvector(value, Words) << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline float widened(float x) { return x; }

inline float widened(uint16_t x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void put(float* to, const float* from, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

inline void put(uint16_t* to, const float* from, int64_t n) {  // rounds to the nearest, ties to even; NaN stays NaN
  for (int64_t i = 0; i < n; i++) {
    uint32_t word;
    std::memcpy(&word, from + i, sizeof word);
    to[i] = from[i] != from[i] ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  }
}

inline float sum_of_lanes(Floats x) {
  float lane[LANES];
  store(lane, x);
  for (int num = LANES / 2; num; num /= 2)
    for (int i = 0; i < num; i++) lane[i] += lane[i + num];
  return lane[0];
}

template <typename C>
inline float dot(const C* a, const float* b, int64_t n) {
  Floats s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    s0 += load(a + i) * load(b + i), s1 += load(a + i + LANES) * load(b + i + LANES);
    s2 += load(a + i + 2 * LANES) * load(b + i + 2 * LANES), s3 += load(a + i + 3 * LANES) * load(b + i + 3 * LANES);
  }
  for (; i + LANES <= n; i += LANES) s0 += load(a + i) * load(b + i);
  float sum = sum_of_lanes((s0 + s1) + (s2 + s3));
  for (; i < n; i++) sum += widened(a[i]) * b[i];
  return sum;
}

// e^x with a relative error below 2e-7. NaN stays NaN.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = x > 88.0f ? Floats{} + 88.0f : x;
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' polynomial of (e^r - 1 - r) / r^2
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats power = (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
  return (p * r * r + r + 1.0f) * power;
}

// x[i] = f(x[i]) for LANES numbers at once; the last ones are filled up with zeros.
template <typename F>
inline void map(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(x + i, f(load(x + i)));
  if (i == n) return;
  float rest[LANES] = {};
  std::memcpy(rest, x + i, (n - i) * sizeof(float));
  store(rest, f(load(rest)));
  std::memcpy(x + i, rest, (n - i) * sizeof(float));
}

// Weights (rows, n) are packed in panels of 32 rows: (panels, n, 32). Row j and row 16 + j of a panel are a pair: with
// bfloat16 one 32-bit word, so that two operations widen a vector of pairs.
constexpr int PANEL = 32, HALF = PANEL / 2, PAIRS = HALF / LANES;
constexpr int AHEAD = 32;  // steps of n from a prefetch to its use

struct Pair {
  Floats first, second;
};

inline Pair load_pair(const float* panel, int k) { return {load(panel + k * LANES), load(panel + HALF + k * LANES)}; }

inline Pair load_pair(const uint16_t* panel, int k) {
  Words both;
  std::memcpy(&both, panel + 2 * k * LANES, sizeof both);
  const Pair little{(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
  return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? little : Pair{little.second, little.first};
}

// y (R, 32) = products of a panel with R rows of x, n apart. Each output is one sum in the order of n, for every R: a
// row of x gives the same bits beside any others. R x C pairs of sums stay in registers.
template <int R, typename T>
void tile(const T* panel, const float* x, int64_t n, float* y) {
  constexpr int C = R <= 2 && PAIRS >= 2 ? 2 : 1;
  for (int k = 0; k < PAIRS; k += C) {
    Pair sum[R][C] = {};
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) {
        if (c == 0) __builtin_prefetch(panel + (i + AHEAD) * PANEL);  // the hardware stops at pages of 4 KiB
        const Pair w = load_pair(panel + i * PANEL, k + c);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          sum[r][c].first += x[r * n + i] * w.first;
          sum[r][c].second += x[r * n + i] * w.second;
        }
      }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) {
        store(y + r * PANEL + (k + c) * LANES, sum[r][c].first);
        store(y + r * PANEL + (k + c) * LANES + HALF, sum[r][c].second);
      }
  }
}

template <typename T>
void tile(const T* panel, const float* x, int64_t R, int64_t n, float* y) {
  switch (R) {
    case 1: return tile<1>(panel, x, n, y);
    case 2: return tile<2>(panel, x, n, y);
    case 3: return tile<3>(panel, x, n, y);
    case 4: return tile<4>(panel, x, n, y);
    case 5: return tile<5>(panel, x, n, y);
    default: return tile<6>(panel, x, n, y);
  }
}

// y (R, rows) = x (R, n) weight^T, or y += it. Every weight is read from memory once, one panel after another: one
// stream is what the prefetcher likes best. The rows of x are split evenly into tiles of at most six.
template <typename T>
void product(const T* weight, const float* x, float* y, int64_t R, int64_t rows, int64_t n, bool add,
             int num_threads) {
  threads::for_each((rows + PANEL - 1) / PANEL, num_threads, [&](int64_t number) {
    const int64_t first = number * PANEL, count = std::min<int64_t>(PANEL, rows - first);
    float found[6 * PANEL];
    for (int64_t start = 0, num; start < R; start += num) {
      const int64_t left = R - start, tiles = (left + 5) / 6;
      num = (left + tiles - 1) / tiles;
      tile(weight + first * n, x + start * n, num, n, found);
      for (int64_t r = 0; r < num; r++) {
        float* to = y + (start + r) * rows + first;
        for (int64_t j = 0; j < count; j++) to[j] = (add ? to[j] : 0) + found[r * PANEL + j];
      }
    }
  });
}

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void rms_norm(const float* x, const float* weight, float* y, int64_t n, float eps) {
  const float scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// x cos + roll(x, D/2) sin, where sin carries the sign (CompiledStep.rotary).
void rotate(float* x, const float* cos, const float* sin, int64_t D) {
  for (int64_t i = 0, j = D / 2; j < D; i++, j++) {
    const float a = x[i], b = x[j];
    x[i] = a * cos[i] + b * sin[i];
    x[j] = b * cos[j] + a * sin[j];
  }
}

// o = share * scores values, of N vectors of numbers of every position.
template <int N, typename C>
inline void weigh(const C* values, const float* scores, float share, float* o, int64_t count, int64_t D) {
  Floats sum[N] = {};
  for (int64_t p = 0; p < count; p++)
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) sum[i] += scores[p] * load(values + p * D + i * LANES);
  for (int i = 0; i < N; i++) store(o + i * LANES, sum[i] * share);
}

// o (D) = softmax(q keys^T / sqrt(D)) values, over `count` positions; scores has room for them.
template <typename C>
void attend(const float* q, const C* keys, const C* values, float* scores, float* o, int64_t count, int64_t D) {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  float largest = -INFINITY, total = 0;
  for (int64_t p = 0; p < count; p++) {
    scores[p] = dot(keys + p * D, q, D) * scale;
    largest = scores[p] > largest ? scores[p] : largest;
  }
  map(scores, count, [&](Floats x) { return exponential(x - largest); });
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p < count; p++) total += scores[p];
  const float share = 1 / total;
  int64_t first = 0;
  for (; first + 64 <= D; first += 64) weigh<64 / LANES>(values + first, scores, share, o + first, count, D);
  for (; first + LANES <= D; first += LANES) weigh<1>(values + first, scores, share, o + first, count, D);
  for (; first < D; first++) {
    float sum = 0;
    for (int64_t p = 0; p < count; p++) sum += scores[p] * widened(values[p * D + first]);
    o[first] = sum * share;
  }
}

// y (R, rows) += B A x of the tokens that use a LoRA; x (R, n). part: of a layer, in the order of Layer.
void add_low_rank(const Pass& c, const Sizes& sizes, int64_t layer, int part, const float* x, float* y, int64_t rows,
                  int64_t n) {
  for (const Group* g = c.groups; g < c.groups + c.num_groups; g++) {
    const LowRank& pair = c.adapters[(g->lora * sizes.depth + layer) * 4 + part];
    if (!pair.down) continue;
    std::vector<float> inner(g->num * pair.rank);
    product(pair.down, x + g->first * n, inner.data(), g->num, pair.rank, n, false, c.num_threads);
    product(pair.up, inner.data(), y + g->first * rows, g->num, rows, pair.rank, true, c.num_threads);
  }
}

// Tokens of one history are in order: all keys and values of a layer are written before its attention. A token sees the
// positions of its history up to its own.
template <typename T, typename C>
void step(const Sizes& sizes, const Layer<T>* layers, const float* norm, const Pass& c) {
  const int64_t W = sizes.width, H = sizes.num_heads, G = sizes.num_kv_heads, D = sizes.head_dim, F = sizes.hidden;
  const int64_t Q = (H + 2 * G) * D, R = c.R, P = c.P;
  const float eps = c.eps;
  float* h = c.h;
  int64_t longest = 0;
  for (int64_t r = 0; r < R; r++) longest = std::max(longest, c.at[r] + 1);
  std::vector<float> x(R * W), qkv(R * Q), o(R * H * D), mlp(R * 2 * F), act(R * F), scores(R * H * longest);
  for (int64_t layer = 0; layer < sizes.depth; layer++) {
    const Layer<T>& w = layers[layer];
    const auto project = [&](int part, const T* weight, const float* from, float* to, int64_t rows, int64_t n, bool add) {
      product(weight, from, to, R, rows, n, add, c.num_threads);
      add_low_rank(c, sizes, layer, part, from, to, rows, n);
    };
    for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, w.attention_norm, &x[r * W], W, eps);
    project(0, w.qkv, x.data(), qkv.data(), Q, W, false);
    C *k = static_cast<C*>(c.keys) + layer * G * P * D, *v = static_cast<C*>(c.values) + layer * G * P * D;
    for (int64_t r = 0; r < R; r++) {
      float* mine = qkv.data() + r * Q;
      for (int64_t head = 0; head < H + G; head++) {
        if (w.q_norm) rms_norm(mine + head * D, head < H ? w.q_norm : w.k_norm, mine + head * D, D, eps);
        rotate(mine + head * D, c.cos + r * D, c.sin + r * D, D);
      }
      for (int64_t g = 0; g < G; g++) {
        const int64_t slot = (g * P + c.first[r] + c.at[r]) * D;
        put(k + slot, mine + (H + g) * D, D);
        put(v + slot, mine + (H + G + g) * D, D);
      }
    }
    threads::for_each(R * H, c.num_threads, [&](int64_t one) {
      const int64_t r = one / H, head = one % H, start = (head / (H / G) * P + c.first[r]) * D;
      attend(&qkv[r * Q + head * D], k + start, v + start, &scores[one * longest], &o[one * D], c.at[r] + 1, D);
    });
    project(1, w.out, o.data(), h, W, H * D, true);
    for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, w.mlp_norm, &x[r * W], W, eps);
    project(2, w.gate_up, x.data(), mlp.data(), 2 * F, W, false);
    for (int64_t r = 0; r < R; r++) {  // SiLU(gate) up
      float *gate = &mlp[r * 2 * F], *up = gate + F;
      map(gate, F, [](Floats x) { return x / (1 + exponential(-x)); });
      for (int64_t i = 0; i < F; i++) act[r * F + i] = gate[i] * up[i];
    }
    project(3, w.down, act.data(), h, W, F, true);
  }
  for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, norm, h + r * W, W, eps);
}

}  // namespace

// What native_step.py calls, once for each pair of dtypes that a model can have.
#define STEP(SUFFIX, T, C)                                                                                             \
  extern "C" void step_##SUFFIX(const void* sizes, const void* layers, const float* norm, const void* pass) {          \
    step<T, C>(*static_cast<const Sizes*>(sizes), static_cast<const Layer<T>*>(layers), norm,                          \
               *static_cast<const Pass*>(pass));                                                                       \
  }
#define READ(SUFFIX, T)                                                                                                \
  extern "C" void read_##SUFFIX(const void* weight, const float* x, float* y, int64_t R, int64_t rows, int64_t n,      \
                                int num_threads) {                                                                     \
    product(static_cast<const T*>(weight), x, y, R, rows, n, false, num_threads);                                      \
  }

STEP(float32_float32, float, float)
STEP(bfloat16_float32, uint16_t, float)
STEP(bfloat16_bfloat16, uint16_t, uint16_t)
READ(float32, float)
READ(bfloat16, uint16_t)
