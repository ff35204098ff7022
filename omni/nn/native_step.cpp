// A few text tokens against their histories, on the CPU: the arithmetic of layer.py in loops that read every weight once.
// Compiled at run time by native_step.py.
//
// Weights are float32 or bfloat16 (widened to float32 as they are read); activations, cache and sums are float32.
//
// Legend: W width, H query heads, G key heads, D head width, F width of the MLP, R tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Sizes {  // the order of native_step.py
  int64_t width, depth, num_heads, num_kv_heads, head_dim, hidden;
};

template <typename T>
struct Layer {  // the order of native_step.py; norms are float32
  const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
  const T *qkv, *out, *gate_up, *down;
};

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {  // bfloat16 is the upper half of a float32
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// e^x with a relative error below 2e-7, in operations that a compiler can do for many x at once. NaN stays NaN.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' polynomial of (e^r - 1 - r) / r^2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return (p * r * r + r + 1.0f) * power;
}

inline float dot(const float* w, const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += w[i] * x[i];
  return sum;
}

inline float dot(const uint16_t* w, const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += widen(w[i]) * x[i];
  return sum;
}

inline void widen_all(const float* w, float* into, int64_t n) { std::memcpy(into, w, n * sizeof(float)); }

inline void widen_all(const uint16_t* w, float* into, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) into[i] = widen(w[i]);
}

typedef float Eight __attribute__((vector_size(32)));  // one number of eight rows of x

// The products of eight rows of weights, n apart, with eight rows of x, which are packed as (n, 8).
inline void tile(const float* w, const Eight* x, int64_t n, Eight y[8]) {
  Eight s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};
  for (int64_t i = 0; i < n; i++) {
    s0 += w[i] * x[i], s1 += w[n + i] * x[i], s2 += w[2 * n + i] * x[i], s3 += w[3 * n + i] * x[i];
    s4 += w[4 * n + i] * x[i], s5 += w[5 * n + i] * x[i], s6 += w[6 * n + i] * x[i], s7 += w[7 * n + i] * x[i];
  }
  y[0] = s0, y[1] = s1, y[2] = s2, y[3] = s3, y[4] = s4, y[5] = s5, y[6] = s6, y[7] = s7;
}

// y (R, rows) = x (R, n) weight^T, or y += it. Every weight is read from memory once, one row after another: one stream is what
// the prefetcher likes best. A few rows of x take dot products; more take tiles of eight by eight.
template <typename T>
void product(const T* weight, const float* x, float* y, int64_t R, int64_t rows, int64_t n, bool add, int threads) {
  if (R < 4) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t r = 0; r < R; r++)
        y[r * rows + row] = (add ? y[r * rows + row] : 0) + dot(weight + row * n, x + r * n, n);
    return;
  }
  const int64_t groups = (R + 7) / 8;
  std::vector<Eight> packed(groups * n);
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < n; i++) packed[r / 8 * n + i][r % 8] = x[r * n + i];
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> wide(8 * n);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += 8) {
      const int64_t count = std::min<int64_t>(8, rows - first);
      widen_all(weight + first * n, wide.data(), count * n);
      for (int64_t g = 0; g < groups; g++) {
        Eight found[8];
        tile(wide.data(), packed.data() + g * n, n, found);
        for (int64_t r = 8 * g; r < std::min(R, 8 * g + 8); r++)
          for (int64_t j = 0; j < count; j++) {
            float& to = y[r * rows + first + j];
            to = (add ? to : 0) + found[j][r % 8];
          }
      }
    }
  }
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

// o (D) = softmax(q keys^T / sqrt(D)) values, over `count` positions; scores has room for them.
void attend(const float* q, const float* keys, const float* values, float* scores, float* o, int64_t count, int64_t D) {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  float largest = -INFINITY, total = 0;
  for (int64_t p = 0; p < count; p++) {
    scores[p] = dot(keys + p * D, q, D) * scale;
    largest = std::fmax(largest, scores[p]);
  }
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p < count; p++) total += scores[p] = exponential(scores[p] - largest);
  const float share = 1 / total;
  for (int64_t first = 0; first < D; first += 64) {  // sums of up to 64 numbers stay in registers
    const int64_t n = std::min<int64_t>(64, D - first);
    float sum[64] = {};
    if (n == 64) {
      for (int64_t p = 0; p < count; p++)
#pragma omp simd
        for (int64_t i = 0; i < 64; i++) sum[i] += scores[p] * values[p * D + first + i];
    } else {
      for (int64_t p = 0; p < count; p++)
        for (int64_t i = 0; i < n; i++) sum[i] += scores[p] * values[p * D + first + i];
    }
    for (int64_t i = 0; i < n; i++) o[first + i] = sum[i] * share;
  }
}

// h (R, W) in and out; cos, sin (R, D). keys, values: (depth, G, P, D), of a pool of P positions. Row r belongs to a
// history that begins at position first[r] of the pool; it is its position at[r], and sees those up to it. Rows of one
// history are in order: all keys and values of a layer are written before its attention.
template <typename T>
void step(const Sizes& c, const Layer<T>* layers, const float* norm, float* h, const float* cos, const float* sin,
          float* keys, float* values, int64_t P, const int64_t* first, const int64_t* at, int64_t R, float eps,
          int threads) {
  const int64_t W = c.width, H = c.num_heads, G = c.num_kv_heads, D = c.head_dim, F = c.hidden, Q = (H + 2 * G) * D;
  int64_t longest = 0;
  for (int64_t r = 0; r < R; r++) longest = std::max(longest, at[r] + 1);
  std::vector<float> x(R * W), qkv(R * Q), o(R * H * D), mlp(R * 2 * F), act(R * F), scores(R * H * longest);
  for (int64_t layer = 0; layer < c.depth; layer++) {
    const Layer<T>& w = layers[layer];
    for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, w.attention_norm, &x[r * W], W, eps);
    product(w.qkv, x.data(), qkv.data(), R, Q, W, false, threads);
    float *k = keys + layer * G * P * D, *v = values + layer * G * P * D;
    for (int64_t r = 0; r < R; r++) {
      float* mine = qkv.data() + r * Q;
      for (int64_t head = 0; head < H + G; head++) {
        rms_norm(mine + head * D, head < H ? w.q_norm : w.k_norm, mine + head * D, D, eps);
        rotate(mine + head * D, cos + r * D, sin + r * D, D);
      }
      for (int64_t g = 0; g < G; g++) {
        const int64_t slot = (g * P + first[r] + at[r]) * D;
        std::memcpy(k + slot, mine + (H + g) * D, D * sizeof(float));
        std::memcpy(v + slot, mine + (H + G + g) * D, D * sizeof(float));
      }
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t one = 0; one < R * H; one++) {
      const int64_t r = one / H, head = one % H, start = (head / (H / G) * P + first[r]) * D;
      attend(&qkv[r * Q + head * D], k + start, v + start, &scores[one * longest], &o[one * D], at[r] + 1, D);
    }
    product(w.out, o.data(), h, R, W, H * D, true, threads);
    for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, w.mlp_norm, &x[r * W], W, eps);
    product(w.gate_up, x.data(), mlp.data(), R, 2 * F, W, false, threads);
    for (int64_t r = 0; r < R; r++) {  // SiLU(gate) up
      const float *gate = &mlp[r * 2 * F], *up = gate + F;
#pragma omp simd
      for (int64_t i = 0; i < F; i++) act[r * F + i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
    }
    product(w.down, act.data(), h, R, W, F, true, threads);
  }
  for (int64_t r = 0; r < R; r++) rms_norm(h + r * W, norm, h + r * W, W, eps);
}

}  // namespace

// What native_step.py calls: each once for float32 weights, once for bfloat16.
#define EXPORT(SUFFIX, T)                                                                                              \
  extern "C" void step_##SUFFIX(const void* sizes, const void* layers, const float* norm, float* h, const float* cos,  \
                                const float* sin, float* keys, float* values, int64_t P, const int64_t* first,         \
                                const int64_t* at, int64_t R, float eps, int threads) {                                \
    step<T>(*static_cast<const Sizes*>(sizes), static_cast<const Layer<T>*>(layers), norm, h, cos, sin, keys, values,  \
            P, first, at, R, eps, threads);                                                                            \
  }                                                                                                                    \
  extern "C" void read_##SUFFIX(const void* weight, const float* x, float* y, int64_t R, int64_t rows, int64_t n,      \
                                int threads) {                                                                         \
    product(static_cast<const T*>(weight), x, y, R, rows, n, false, threads);                                          \
  }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
