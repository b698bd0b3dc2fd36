package qcow2_test

import (
	"bytes"
	"context"
	"errors"

	"github.com/droverproject/drover/qcow2"
)

// modelState is how much of the state of a machine the model looks at.
const modelState = 300 << 10

// stateStep writes to the state of a machine or reads it. h.state is what it holds, nil when that is not known: whatever gives
// the disk another size or another mapping does with it what it likes, as long as the disk does not show it.
func (h *harness) stateStep() {
	h.t.Helper()
	ctx := context.Background()
	all := make([]byte, modelState)
	err := h.im.ReadVMState(ctx, all, 0)
	if errors.Is(err, qcow2.ErrNoVMState) {
		if len(h.base) <= len(h.model) {
			h.t.Fatalf("%v: no place for machine state: %v", h.v, err)
		}
		h.state = nil
		return
	}
	h.must("read machine state", err)
	if h.state == nil {
		h.state = all
	}
	if !bytes.Equal(all, h.state) {
		h.t.Fatalf("%v: machine state differs", h.v)
	}
	off := h.r.IntN(modelState)
	p := h.state[off:][:1+h.r.IntN(min(modelState-off, 1<<h.r.IntN(19)))]
	for i := range p {
		p[i] = byte(h.r.Uint32())
	}
	err = h.im.WriteVMState(ctx, p, int64(off))
	if h.data != nil && errors.Is(err, qcow2.ErrNoVMState) {
		h.state = nil
		return
	}
	h.must("write machine state", err)
}
