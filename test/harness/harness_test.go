package harness

import (
	"bytes"
	"reflect"
	"testing"
)

func TestOpsDependOnTheSeedOnly(t *testing.T) {
	s := Shape{Size: 1<<20 + 512, Cluster: 4096, MaxLen: 64 << 10}
	a, b := Ops(1, 300, s), Ops(1, 300, s)
	if !reflect.DeepEqual(a, b) {
		t.Error("the same seed gave other operations")
	}
	if reflect.DeepEqual(a, Ops(2, 300, s)) {
		t.Error("another seed gave the same operations")
	}
	seen := make(map[Kind]int)
	for _, op := range a {
		seen[op.Kind]++
		if op.Kind != Flush && (op.Off < 0 || op.Len < 1 || op.Len > s.MaxLen || op.Off+int64(op.Len) > s.Size) {
			t.Errorf("%v lies outside the disk", op)
		}
	}
	for k := Write; k <= ReadBack; k++ {
		if seen[k] == 0 {
			t.Errorf("300 operations without a single %v", k)
		}
	}
}

func TestSameFindsTheFirstDifference(t *testing.T) {
	want := bytes.Repeat([]byte{7}, 1000)
	got := bytes.Clone(want)
	if err := Same(got, want, 0); err != nil {
		t.Error(err)
	}
	got[900] = 8
	if err := Same(got, want, 100); err == nil || !bytes.Contains([]byte(err.Error()), []byte("first at 1000 ")) {
		t.Errorf("got %v, want the difference at 1000", err)
	}
	if err := Same(got[:10], want, 0); err == nil {
		t.Error("a short read is a difference")
	}
}

func TestParseMapJoinsNeighbours(t *testing.T) {
	spans := ParseMap(t, []byte(`[
		{"start":0,"length":10,"depth":0,"present":true,"zero":false,"data":true,"offset":100},
		{"start":10,"length":10,"depth":0,"present":true,"zero":false,"data":true,"offset":110},
		{"start":20,"length":10,"depth":0,"present":true,"zero":false,"data":true,"offset":500},
		{"start":30,"length":10,"depth":0,"present":true,"zero":true,"data":false},
		{"start":40,"length":10,"depth":0,"present":true,"zero":true,"data":false},
		{"start":50,"length":10,"depth":1,"present":true,"zero":true,"data":false}]`))
	var lengths []int64
	for _, s := range spans {
		lengths = append(lengths, s.Length)
	}
	if want := []int64{20, 10, 20, 10}; !reflect.DeepEqual(lengths, want) {
		t.Errorf("lengths %v, want %v", lengths, want)
	}
}
