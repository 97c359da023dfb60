// Behind machine.cuh. Defined outside: ACT_name.

__device__ __forceinline__ float logistic(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// The activation functions of ModelConfig; the tanh of GELU is written as a sigmoid.
__device__ __forceinline__ float activate(float x) {
#if ACT_gelu
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#elif ACT_gelu_tanh
    return x * logistic(1.5957691216057308f * (x + 0.044715f * x * x * x));
#elif ACT_quick_gelu
    return x * logistic(1.702f * x);
#elif ACT_relu
    return fmaxf(x, 0.0f);
#elif ACT_relu2
    x = fmaxf(x, 0.0f);
    return x * x;
#elif ACT_silu
    return x * logistic(x);
#else
#error "unknown activation"
#endif
}
