package storage

import (
	"bytes"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Whatever the kernel moves per call, and however few buffers it takes, the parts add up to the whole.
func TestVectorShortCounts(t *testing.T) {
	data := make([]byte, 1000)
	for i := range data {
		data[i] = byte(i * 7)
	}
	bufs := [][]byte{nil, data[:1], data[1:300], {}, {}, data[300:301], data[301:999], data[999:], nil}
	for _, step := range []int{1, 2, 299, 300, 500, 1000} {
		for _, slots := range []int{1, 2, 16} {
			v := vector{bufs: bufs}
			iov := make([]unix.Iovec, slots)
			var got []byte
			for len(got) < len(data) {
				n := 0
				for _, one := range v.fill(iov) {
					part := unsafe.Slice(one.Base, int(one.Len))
					part = part[:min(len(part), step-n)]
					got = append(got, part...)
					n += len(part)
				}
				if n == 0 {
					t.Fatalf("steps of %d, %d slots: stuck at %d", step, slots, len(got))
				}
				v.advance(n)
			}
			if !bytes.Equal(got, data) {
				t.Errorf("steps of %d, %d slots: wrong bytes", step, slots)
			}
		}
	}
}

func TestVectorScatterGather(t *testing.T) {
	data := []byte("0123456789")
	dst := make([]byte, 10)
	v := vector{bufs: [][]byte{dst[:3], nil, dst[3:4], dst[4:]}}
	v.scatter(data[:2])
	v.scatter(data[2:7])
	v.scatter(data[7:])
	if !bytes.Equal(dst, data) {
		t.Errorf("scatter gave %q", dst)
	}
	v = vector{bufs: [][]byte{{}, data[:5], data[5:6], {}, data[6:]}}
	got := make([]byte, 10)
	v.gather(got[:6])
	v.gather(got[6:])
	if !bytes.Equal(got, data) {
		t.Errorf("gather gave %q", got)
	}
}
