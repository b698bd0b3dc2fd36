package codec

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/flate"
)

// oracle inflates with another decoder.
func oracle(dst, src []byte) error {
	_, err := io.ReadFull(flate.NewReader(bytes.NewReader(src)), dst)
	return err
}

// TestInflateAgreesWithAnother gives good and damaged streams of every kind of block to two decoders.
func TestInflateAgreesWithAnother(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 5))
	for round := range 400 {
		size := 1 << (9 + r.IntN(9))
		plain := clusterContents(size)[[]string{"text", "mixed", "letters", "zeroes"}[r.IntN(4)]]
		if r.IntN(4) == 0 { // long codes
			for i := range plain {
				plain[i] = byte(int(r.ExpFloat64() * 9))
			}
		}
		var b bytes.Buffer
		level := []int{flate.HuffmanOnly, flate.NoCompression, 1, 3, 6, 9}[r.IntN(6)]
		w, err := flate.NewWriter(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < size; { // several blocks
			n := min(1+r.IntN(size), size-at)
			_, _ = w.Write(plain[at : at+n])
			_ = w.Flush()
			at += n
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := inflate(got, b.Bytes()); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("round %d, level %d: %v", round, level, err)
		}
		for range 60 {
			bad := bytes.Clone(b.Bytes())
			for range 1 + r.IntN(3) {
				bad[r.IntN(min(len(bad), 1+r.IntN(len(bad))))] ^= 1 << r.IntN(8)
			}
			want := make([]byte, size)
			wantErr := oracle(want, bad)
			err := inflate(got, bad)
			switch {
			case err != nil && !errors.Is(err, ErrCorrupt):
				t.Fatalf("round %d: %v is not ErrCorrupt", round, err)
			case err == nil && wantErr == nil && !bytes.Equal(got, want):
				t.Fatalf("round %d: two decoders find different bytes", round)
			case (err == nil) != (wantErr == nil):
				t.Fatalf("round %d, level %d: one decoder says %v, the other %v", round, level, err, wantErr)
			}
		}
	}
}

// TestCopyMatch copies every short match and compares with byte after byte.
func TestCopyMatch(t *testing.T) {
	for dist := 1; dist < 40; dist++ {
		for length := 1; length < 60; length++ {
			for room := range 12 {
				got, want := make([]byte, 50+length+room), make([]byte, 50+length+room)
				for i := range 50 {
					got[i], want[i] = byte(i*7+1), byte(i*7+1)
				}
				for i := range length {
					want[50+i] = want[50+i-dist]
				}
				if end := copyMatch(got, 50, dist, length); end != 50+length || !bytes.Equal(got[:end], want[:end]) {
					t.Fatalf("distance %d, length %d, room %d: %v, want %v", dist, length, room, got, want)
				}
			}
		}
	}
}
