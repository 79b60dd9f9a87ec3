/* The bottleneck's activations and their slopes, written so that compilers vectorize them.

   Included once for each arithmetic: REAL is float for bf16 tensors and double for fp32 ones, so
   that what is stored is right to its last bit but one. NAME(x) makes the names distinct. */

#define INLINE static inline __attribute__((always_inline))

/* e^x for x <= 0, to 5e-9: 2^n · e^r with |r| <= ln(2)/2; 0 below the normal numbers of fp32. */
INLINE REAL NAME(decay)(REAL x) {
    REAL within = x < (REAL)-87 ? (REAL)-87 : x;
    REAL n = NAME(nearest)(within * (REAL)1.4426950408889634);
    REAL r = NAME(fma)(n, (REAL)-0.693145751953125, within);
    r = NAME(fma)(n, (REAL)-1.4286068203094172e-6, r);
    REAL sum = (REAL)(1.0 / 5040);
    sum = NAME(fma)(sum, r, (REAL)(1.0 / 720));
    sum = NAME(fma)(sum, r, (REAL)(1.0 / 120));
    sum = NAME(fma)(sum, r, (REAL)(1.0 / 24));
    sum = NAME(fma)(sum, r, (REAL)(1.0 / 6));
    sum = NAME(fma)(sum, r, (REAL)0.5);
    sum = NAME(fma)(sum, r, 1);
    sum = NAME(fma)(sum, r, 1);
    return x < (REAL)-87 ? 0 : sum * NAME(power_of_two)(n);
}

/* sigmoid(v) and sigmoid(-v), neither by subtraction. */
INLINE void NAME(gates)(REAL v, REAL *open, REAL *shut) {
    REAL e = NAME(decay)(v < 0 ? v : -v), large = 1 / (1 + e), small = e * large;
    *open = v < 0 ? small : large;
    *shut = v < 0 ? large : small;
}

INLINE void NAME(identity)(REAL z, REAL *value, REAL *slope) {
    *value = z;
    *slope = 1;
}

INLINE void NAME(relu)(REAL z, REAL *value, REAL *slope) {
    *value = z <= 0 ? 0 : z; /* nan stays nan */
    *slope = z <= 0 ? 0 : 1;
}

INLINE void NAME(silu)(REAL z, REAL *value, REAL *slope) {
    REAL open, shut;
    NAME(gates)(z, &open, &shut);
    *value = z * open;
    *slope = open + z * open * shut;
}

/* z·Φ(z). The upper tail is e^(-a²/2) times a polynomial in t = 1/(1 + a/4), which was fitted to
   it for 0 <= a <= 14 with a relative error below 1e-8. */
INLINE void NAME(gelu)(REAL z, REAL *value, REAL *slope) {
    REAL a = z < 0 ? -z : z, t = 1 / (1 + a * (REAL)0.25);
    REAL sum = (REAL)0.01657988951;
    sum = NAME(fma)(sum, t, (REAL)-0.06279344171);
    sum = NAME(fma)(sum, t, (REAL)0.05165529977);
    sum = NAME(fma)(sum, t, (REAL)0.02843202268);
    sum = NAME(fma)(sum, t, (REAL)0.01271488077);
    sum = NAME(fma)(sum, t, (REAL)0.08665534068);
    sum = NAME(fma)(sum, t, (REAL)0.07199992268);
    sum = NAME(fma)(sum, t, (REAL)0.09551561897);
    sum = NAME(fma)(sum, t, (REAL)0.09949256772);
    sum = NAME(fma)(sum, t, (REAL)0.09974790301);
    REAL bell = NAME(decay)(z * z * (REAL)-0.5);
    REAL tail = bell * sum * t, below = z < 0 ? tail : 1 - tail;
    *value = z * below;
    *slope = below + z * bell * (REAL)0.3989422804014327;
}

/* z·sigmoid(2u) with u = √(2/π)·(z + 0.044715 z³), which is the tanh form. */
INLINE void NAME(gelu_tanh)(REAL z, REAL *value, REAL *slope) {
    REAL square = z * z;
    REAL twice = (REAL)1.5957691216057308 * z * (1 + (REAL)0.044715 * square);
    REAL rise = (REAL)1.5957691216057308 * (1 + (REAL)0.134145 * square);
    REAL open, shut;
    NAME(gates)(twice, &open, &shut);
    *value = z * open;
    *slope = open + z * open * shut * rise;
}
