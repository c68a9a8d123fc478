/* The gated unit act(gate) * up (Shazeer 2020, arXiv:2002.05202) and its gradient. */
#ifndef TT_GATED_H
#define TT_GATED_H

#include "rows.h"

enum { TT_SILU = 0, TT_GELU = 1, TT_GELU_TANH = 2, TT_RELU = 3 };

typedef struct {
    const void *grad, *gate, *up;
    void *d_gate, *d_up; /* forward: the result is d_gate */
    int64_t rows, n, grad_stride, gate_stride, up_stride, d_gate_stride, d_up_stride;
    int32_t dtype, kind;
} tt_gated_args;

/* x s(u), with s(u) = 1 / (1 + e^-u) and du its derivative of u by x. */
TT_INLINE vf times_sigmoid(vf x, vf u, vf du, vf *derivative) {
    vf e = vf_exp(-u);
    vf s = vf_reciprocal(1.0f + e);
    vf act = x * s;
    *derivative = s + act * (e * s) * du; /* 1 - s = e s, without cancellation */
    return act;
}

/* x P(x), where P is the normal distribution: P(-z) = e^(-z^2/2) t Q(t) with t = 1 / (1 + 0.35 z), z >= 0. Q was fitted
 * for the least relative error, 3e-8. */
TT_INLINE vf times_normal(vf x, vf *derivative) {
    vf e = vf_exp(x * x * -0.5f);
    vf z = vf_max(x, -x);
    vf t = vf_reciprocal(z * 0.35f + 1.0f);
    vf q = vf_set(-2.914591877e-02f);
    q = q * t + 1.439716417e-01f;
    q = q * t - 2.557141388e-01f;
    q = q * t + 1.591740294e-01f;
    q = q * t - 2.310974629e-02f;
    q = q * t + 1.055079673e-01f;
    q = q * t + 1.198328767e-01f;
    q = q * t + 1.398618685e-01f;
    q = q * t + 1.396214044e-01f;
    vf tail = e * t * q;
    vf p = vf_select(x > 0.0f, 1.0f - tail, tail);
    *derivative = p + x * e * 0.39894228040143268f; /* 1 / sqrt(2 pi) */
    return x * p;
}

/* The activation, and its derivative. */
TT_INLINE vf activation(vf x, int kind, vf *derivative) {
    if (kind == TT_SILU) return times_sigmoid(x, x, vf_set(1.0f), derivative);
    if (kind == TT_GELU) return times_normal(x, derivative);
    if (kind == TT_GELU_TANH) { /* (1 + tanh(a)) / 2 = s(2 a), a = sqrt(2 / pi) (x + 0.044715 x^3) */
        vf u = x * (x * x * 0.0713548162726f + 1.59576912160573f);
        return times_sigmoid(x, u, x * x * 0.2140644488178f + 1.59576912160573f, derivative);
    }
    vi off = x <= 0.0f; /* not of a NaN */
    *derivative = vf_select(off, vf_set(0.0f), vf_set(1.0f));
    return vf_select(off, vf_set(0.0f), x);
}

TT_INLINE void gated_row(tt_gated_args c, int64_t row, int dtype, int kind) {
    const void *gate = at_row(c.gate, row, c.gate_stride, dtype), *up = at_row(c.up, row, c.up_stride, dtype);
    const void *grad = c.grad ? at_row(c.grad, row, c.grad_stride, dtype) : 0;
    void *d_gate = at_row(c.d_gate, row, c.d_gate_stride, dtype);
    void *d_up = c.d_up ? at_row(c.d_up, row, c.d_up_stride, dtype) : 0;
    vf derivative;
    if (!grad)
        for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
            vf act = activation(load_at(gate, i, c.n, dtype, 0.0f), kind, &derivative);
            store_at(d_gate, i, c.n, act * load_at(up, i, c.n, dtype, 0.0f), dtype);
        }
    else
        for (int64_t i = 0; i < c.n; i += TT_WIDTH) {
            vf g = load_at(grad, i, c.n, dtype, 0.0f);
            vf act = activation(load_at(gate, i, c.n, dtype, 0.0f), kind, &derivative);
            vf for_gate = g * load_at(up, i, c.n, dtype, 0.0f) * derivative;
            store_at(d_gate, i, c.n, for_gate, dtype);
            store_at(d_up, i, c.n, g * act, dtype);
        }
}

static void gated_task(void *context, int64_t task) {
    const tt_gated_args *c = (const tt_gated_args *)context;
    TT_EACH_ROW(c, task, row) switch (c->kind * 2 + c->dtype) {
        case 0: gated_row(*c, row, 0, TT_SILU); break;
        case 1: gated_row(*c, row, 1, TT_SILU); break;
        case 2: gated_row(*c, row, 0, TT_GELU); break;
        case 3: gated_row(*c, row, 1, TT_GELU); break;
        case 4: gated_row(*c, row, 0, TT_GELU_TANH); break;
        case 5: gated_row(*c, row, 1, TT_GELU_TANH); break;
        case 6: gated_row(*c, row, 0, TT_RELU); break;
        default: gated_row(*c, row, 1, TT_RELU);
    }
}

TT_API void tt_gated_forward(const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, void *out,
                             int64_t out_stride, int64_t rows, int64_t n, int32_t dtype, int32_t kind) {
    tt_gated_args c = {0, gate, up, out, 0, rows, n, 0, gate_stride, up_stride, out_stride, 0, dtype, kind};
    tt_parallel(tasks_of(rows, n), gated_task, &c);
}

TT_API void tt_gated_backward(const void *grad, int64_t grad_stride, const void *gate, int64_t gate_stride,
                              const void *up, int64_t up_stride, void *d_gate, int64_t d_gate_stride, void *d_up,
                              int64_t d_up_stride, int64_t rows, int64_t n, int32_t dtype, int32_t kind) {
    tt_gated_args c = {grad, gate, up, d_gate, d_up, rows, n, grad_stride, gate_stride, up_stride, d_gate_stride,
                  d_up_stride, dtype, kind};
    tt_parallel(tasks_of(rows, n), gated_task, &c);
}

#endif
