// Attention in float32 by AVX-512. Both products are oneDNN's, by its kernels for small matrices.

namespace {

constexpr int64_t kPanel = 512;  // tokens whose keys a product reads at once, from the L2 cache

// e to the power of x: x is n ln 2 + r, and a polynomial of r errs by less than float32's rounding
// (Cephes). ln 2 is split in two, so that n times its first part is exact.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order, which keeps NaN; e^-200 is 0
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

class Avx512Kernel {
 public:
  using Number = float;
  static constexpr at::ScalarType kDtype = at::kFloat;

  Avx512Kernel(int64_t tokens, int64_t width)
      : tokens_(tokens), width_(width), padded_(round_up(tokens, kLanes)),
        full_(round_up(width, kLanes)),
        arena_(4 * (2 * full_ * padded_ + kQueries * (padded_ + full_ + 1))),
        keys_(arena_.take<float>(full_ * padded_)),
        values_(arena_.take<float>(full_ * padded_)),
        scores_(arena_.take<float>(kQueries * padded_)),
        sums_(arena_.take<float>(kQueries * full_)),
        inverse_(arena_.take<float>(kQueries)) {}

  // Transpose the keys to (K, T), in panels of T. The values are copied, as rows that lie apart by
  // the width of a model fall on few sets of a cache.
  void pack(const float* keys, int64_t key_row, const float* values, int64_t value_row) {
    for (int64_t j = 0; j < tokens_; ++j)
      for (int64_t c = 0; c < full_; c += kLanes)
        _mm512_store_ps(values_ + j * full_ + c, _mm512_maskz_loadu_ps(first_lanes(width_ - c),
                                                                      values + j * value_row + c));
    for (int64_t j = 0; j < padded_; j += kLanes) {
      const int64_t panel = j / kPanel * kPanel, row = panel_width(panel);
      float* const to = keys_ + panel * full_ + j - panel;
      for (int64_t c = 0; c < full_; c += kLanes) {
        const __mmask16 mask = first_lanes(width_ - c);
        __m512i rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] = j + i < tokens_
                        ? _mm512_maskz_loadu_epi32(mask, keys + (j + i) * key_row + c)
                        : _mm512_setzero_si512();
        transpose(rows);
        for (int64_t i = 0; i < kLanes; ++i)
          _mm512_store_si512(to + (c + i) * row, rows[i]);
      }
    }
  }

  void attend(const float* queries, int64_t row, int64_t count, float* out, int64_t out_row) {
    for (int64_t j = 0; j < padded_; j += kPanel) {
      const int64_t keys = panel_width(j);
      at::native::cpublas::brgemm(count, keys, width_, row, keys, padded_, false, queries,
                                  keys_ + j * full_, scores_ + j);
    }
    for (int64_t i = 0; i < count; ++i) inverse_[i] = 1.0f / compute_weights(scores_ + i * padded_);
    for (int64_t j = 0; j < tokens_; j += kPanel)
      at::native::cpublas::brgemm(count, width_, std::min(kPanel, tokens_ - j), padded_, full_,
                                  full_, j > 0, scores_ + j, values_ + j * full_, sums_);
    const float* sums = sums_;
    for (int64_t i = 0; i < count; ++i, out += out_row) {
      const __m512 inverse = _mm512_set1_ps(inverse_[i]);
      for (int64_t c = 0; c < full_; c += kLanes, sums += kLanes)
        _mm512_mask_storeu_ps(out + c, first_lanes(width_ - c),
                              _mm512_mul_ps(inverse, _mm512_load_ps(sums)));
    }
  }

 private:
  int64_t panel_width(int64_t start) const { return std::min(kPanel, padded_ - start); }

  // Write the weights of a row over its scores, and return their sum.
  float compute_weights(float* scores) const {
    const __m512 largest = _mm512_set1_ps(largest_score(scores, tokens_));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < tokens_; j += kLanes) {
      const __m512 score = _mm512_sub_ps(_mm512_load_ps(scores + j), largest);
      const __m512 weight = _mm512_maskz_mov_ps(first_lanes(tokens_ - j), exp(score));
      sum = _mm512_add_ps(sum, weight);
      _mm512_store_ps(scores + j, weight);
    }
    return _mm512_reduce_add_ps(sum);
  }

  const int64_t tokens_, width_, padded_, full_;  // T, K; each rounded up
  Arena arena_;
  float *const keys_, *const values_, *const scores_, *const sums_, *const inverse_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(vitlib, library) {
  library.def("attention_avx512(Tensor q, Tensor k, Tensor v) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitlib, CPU, library) {
  library.impl("attention_avx512", attend<Avx512Kernel>);
}
