package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
)

var types = []struct {
	id   uint8
	name string
}{{Zlib, "zlib"}, {Zstd, "zstd"}}

// clusterContents are clusters of different compressibility: from one byte repeated to nearly random.
func clusterContents(size int) map[string][]byte {
	rng := rand.New(rand.NewPCG(1, uint64(size)))
	text := bytes.Repeat([]byte("the quick brown fox 0123456789 "), size/31+1)[:size]
	mixed := make([]byte, size)
	for i := range mixed {
		mixed[i] = byte(rng.Uint32())
		if i%1024 < 768 {
			mixed[i] = byte(i / 512)
		}
	}
	letters := make([]byte, size)
	for i := range letters {
		letters[i] = "abcdefgh"[rng.IntN(8)]
	}
	return map[string][]byte{
		"zeroes":  make([]byte, size),
		"text":    text,
		"mixed":   mixed,
		"letters": letters,
	}
}

func TestRoundTripAllClusterSizes(t *testing.T) {
	for _, typ := range types {
		for bits := 9; bits <= 21; bits++ {
			size := 1 << bits
			for name, src := range clusterContents(size) {
				dst := make([]byte, size)
				n, ok, err := Compress(typ.id, dst, src)
				if err != nil {
					t.Fatalf("%s %d %s: %v", typ.name, size, name, err)
				}
				if !ok {
					t.Errorf("%s %d %s: did not compress", typ.name, size, name)
					continue
				}
				// On disk the stream is followed by whatever fills its last sector.
				stored := append(bytes.Clone(dst[:n]), bytes.Repeat([]byte{0xA7}, 511)...)
				got := make([]byte, size)
				if err := Decompress(typ.id, got, stored); err != nil {
					t.Fatalf("%s %d %s: %v", typ.name, size, name, err)
				}
				if !bytes.Equal(got, src) {
					t.Fatalf("%s %d %s: content differs", typ.name, size, name)
				}
			}
		}
	}
}

func TestIncompressibleIsRefused(t *testing.T) {
	for _, typ := range types {
		for _, size := range []int{512, 4096, 65536, 2 << 20} {
			src := make([]byte, size)
			rng := rand.New(rand.NewPCG(7, 7))
			for i := range src {
				src[i] = byte(rng.Uint32())
			}
			if n, ok, err := Compress(typ.id, make([]byte, 2*size), src); ok || err != nil {
				t.Errorf("%s %d: Compress = %d, %v, %v; want not ok", typ.name, size, n, ok, err)
			}
		}
	}
}

func TestCompressStaysInsideDst(t *testing.T) {
	src := clusterContents(65536)["mixed"]
	for _, typ := range types {
		full := make([]byte, 65536)
		n, ok, err := Compress(typ.id, full, src)
		if !ok || err != nil {
			t.Fatalf("%s: %v %v", typ.name, ok, err)
		}
		for _, room := range []int{0, 1, n / 2, n - 1, n} {
			buf := bytes.Repeat([]byte{0x5C}, n+64)
			_, ok, err := Compress(typ.id, buf[:room], src)
			if err != nil || ok != (room >= n) {
				t.Errorf("%s: room %d of %d: ok=%v err=%v", typ.name, room, n, ok, err)
			}
			if !bytes.Equal(buf[room:], bytes.Repeat([]byte{0x5C}, n+64-room)) {
				t.Errorf("%s: room %d: wrote past dst", typ.name, room)
			}
		}
	}
}

func TestUnknownType(t *testing.T) {
	if err := Decompress(2, make([]byte, 512), make([]byte, 512)); !errors.Is(err, ErrUnknownType) {
		t.Errorf("Decompress: %v", err)
	}
	if _, _, err := Compress(2, make([]byte, 512), make([]byte, 512)); !errors.Is(err, ErrUnknownType) {
		t.Errorf("Compress: %v", err)
	}
}

// zstdFrames encodes src as frames of the given sizes, each with a checksum and, if skip, a skippable frame before it.
func zstdFrames(t testing.TB, src []byte, sizes []int, skip bool) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	var out []byte
	for _, n := range sizes {
		if skip {
			out = append(out, 0x53, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 'x', 'y', 'z')
		}
		out = enc.EncodeAll(src[:n], out)
		src = src[n:]
	}
	return out
}

func TestZstdConcatenatedFrames(t *testing.T) {
	src := clusterContents(65536)["mixed"]
	dst := make([]byte, len(src))
	stream := zstdFrames(t, src, []int{1000, 30000, 65536 - 31000}, true)
	next := zstdFrames(t, src, []int{512}, false)
	for name, tail := range map[string][]byte{
		"nothing": nil, "zeroes": make([]byte, 300), "the next cluster": next, "half a frame": next[:20],
	} {
		if err := Decompress(Zstd, dst, append(bytes.Clone(stream), tail...)); err != nil {
			t.Errorf("followed by %s: %v", name, err)
		} else if !bytes.Equal(dst, src) {
			t.Errorf("followed by %s: content differs", name)
		}
	}
	if err := Decompress(Zstd, make([]byte, 32768), stream); !errors.Is(err, ErrCorrupt) {
		t.Errorf("frames that overrun the cluster: %v", err)
	}
	if err := Decompress(Zstd, make([]byte, 131072), stream); !errors.Is(err, ErrCorrupt) {
		t.Errorf("frames that do not fill the cluster: %v", err)
	}
}

// TestZstdBombIsBounded: a frame that claims to be huge must not make the decoder allocate for the claim.
func TestZstdBombIsBounded(t *testing.T) {
	huge := binary.LittleEndian.AppendUint32(nil, zstdMagic)
	huge = append(huge, 0xE0) // 8-byte content size, single segment
	huge = binary.LittleEndian.AppendUint64(huge, 1<<40)
	for range 100 {
		huge = append(huge, 0x02, 0x00, 0x10, 0xAA) // an RLE block of 128 KiB
	}
	huge = append(huge, 0x03, 0, 0, 0xAA) // a last, empty RLE block
	window := binary.LittleEndian.AppendUint32(nil, zstdMagic)
	window = append(window, 0, 0x88) // 128 MiB window, no content size
	window = append(window, huge[13:]...)
	for name, in := range map[string][]byte{"content size": huge, "window": window} {
		dst := make([]byte, 65536)
		var before, after runtime.MemStats
		const calls = 50
		runtime.ReadMemStats(&before)
		for range calls {
			if err := Decompress(Zstd, dst, in); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: %v", name, err)
			}
		}
		runtime.ReadMemStats(&after)
		if perCall := (after.TotalAlloc - before.TotalAlloc) / calls; perCall > 1<<20 {
			t.Errorf("%s: %d bytes allocated per call", name, perCall)
		}
	}
}

func TestTruncatedAndFlippedInput(t *testing.T) {
	src := clusterContents(4096)["mixed"]
	rng := rand.New(rand.NewPCG(3, 9))
	for _, typ := range types {
		buf := make([]byte, 4096)
		n, ok, err := Compress(typ.id, buf, src)
		if !ok || err != nil {
			t.Fatal(typ.name, ok, err)
		}
		dst := make([]byte, 4096)
		for cut := range n {
			// A deflate stream may lack nothing but its end marker: then the cluster is complete all the same.
			if err := Decompress(typ.id, dst, buf[:cut]); err == nil {
				if !bytes.Equal(dst, src) || typ.id == Zstd {
					t.Fatalf("%s: cut at %d of %d: no error", typ.name, cut, n)
				}
			} else if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: cut at %d: %v is not ErrCorrupt", typ.name, cut, err)
			}
		}
		for range 3000 {
			bad := bytes.Clone(buf[:n])
			for range 1 + rng.IntN(4) {
				bad[rng.IntN(n)] ^= byte(1 + rng.IntN(255))
			}
			if err := Decompress(typ.id, dst, bad); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: %v is not ErrCorrupt", typ.name, err)
			}
		}
		// The pooled decoders must be none the worse for it.
		if err := Decompress(typ.id, dst, buf[:n]); err != nil || !bytes.Equal(dst, src) {
			t.Fatalf("%s: good input after bad: %v", typ.name, err)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	contents := clusterContents(65536)
	var wg sync.WaitGroup
	for name, src := range contents {
		for _, typ := range types {
			wg.Add(1)
			go func() {
				defer wg.Done()
				dst, got := make([]byte, 65536), make([]byte, 65536)
				for range 20 {
					n, ok, err := Compress(typ.id, dst, src)
					if err != nil || !ok {
						t.Errorf("%s %s: %v %v", typ.name, name, ok, err)
						return
					}
					if err := Decompress(typ.id, got, dst[:n]); err != nil || !bytes.Equal(got, src) {
						t.Errorf("%s %s: %v", typ.name, name, err)
						return
					}
				}
			}()
		}
	}
	wg.Wait()
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools at random")
	}
	src := clusterContents(65536)["letters"]
	for _, typ := range types {
		buf, dst := make([]byte, 65536), make([]byte, 65536)
		n, _, _ := Compress(typ.id, buf, src)
		// An emptied pool may cost an allocation now and then, never one per call.
		if avg := testing.AllocsPerRun(200, func() {
			if err := Decompress(typ.id, dst, buf[:n]); err != nil {
				t.Fatal(err)
			}
		}); avg > 1.5 {
			t.Errorf("%s: %.1f allocations per Decompress", typ.name, avg)
		}
	}
}

// image is as much of a QCOW2 file as these tests need: where its compressed clusters are.
type image struct {
	path        string
	file        []byte
	clusterBits uint
	l2          []uint64 // byte offsets of the L2 tables
}

func readImage(t *testing.T, path string) *image {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	im := &image{path: path, file: b, clusterBits: uint(binary.BigEndian.Uint32(b[20:]))}
	l1 := binary.BigEndian.Uint64(b[40:])
	for i := range uint64(binary.BigEndian.Uint32(b[36:])) {
		im.l2 = append(im.l2, binary.BigEndian.Uint64(b[l1+8*i:])&0x00FFFFFFFFFFFE00)
	}
	return im
}

// compressed calls fn for each compressed cluster with its number, the place of its entry, and its sectors on disk.
func (im *image) compressed(fn func(guest int, entry uint64, data []byte)) {
	size := uint64(1) << im.clusterBits
	for i, l2 := range im.l2 {
		for j := uint64(0); l2 != 0 && j < size/8; j++ {
			e := binary.BigEndian.Uint64(im.file[l2+8*j:])
			if e&(1<<62) == 0 {
				continue
			}
			x := 70 - im.clusterBits
			off := e & (1<<x - 1)
			sectors := e>>x&(1<<(im.clusterBits-8)-1) + 1
			end := min(off&^511+sectors*512, uint64(len(im.file)))
			fn(i*int(size/8)+int(j), l2+8*j, im.file[off:end])
		}
	}
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

// TestReadsWhatQEMUWrites decompresses every cluster of images that qemu-img compressed.
func TestReadsWhatQEMUWrites(t *testing.T) {
	for _, typ := range types {
		for _, size := range []int{512, 4096, 65536, 2 << 20} {
			dir := t.TempDir()
			raw := filepath.Join(dir, "raw")
			var disk []byte
			for _, c := range clusterContents(max(size, 8192)) {
				disk = append(disk, c...)
			}
			if err := os.WriteFile(raw, disk, 0o600); err != nil {
				t.Fatal(err)
			}
			img := filepath.Join(dir, "img")
			qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2",
				"-o", fmt.Sprintf("cluster_size=%d,compression_type=%s", size, typ.name), raw, img)
			count := 0
			dst := make([]byte, size)
			readImage(t, img).compressed(func(guest int, _ uint64, data []byte) {
				count++
				if err := Decompress(typ.id, dst, data); err != nil {
					t.Errorf("%s %d: cluster %d: %v", typ.name, size, guest, err)
				} else if !bytes.Equal(dst, disk[guest*size:][:size]) {
					t.Errorf("%s %d: cluster %d: content differs", typ.name, size, guest)
				}
			})
			if count == 0 {
				t.Errorf("%s %d: the image has no compressed cluster", typ.name, size)
			}
		}
	}
}

// TestQEMUReadsWhatWeWrite puts our streams in the place of QEMU's and lets QEMU read the image.
func TestQEMUReadsWhatWeWrite(t *testing.T) {
	for _, typ := range types {
		for _, size := range []int{512, 4096, 65536, 2 << 20} {
			for name, src := range clusterContents(size) {
				dir := t.TempDir()
				raw, img, back := filepath.Join(dir, "raw"), filepath.Join(dir, "img"), filepath.Join(dir, "back")
				if err := os.WriteFile(raw, bytes.Repeat([]byte{1}, size), 0o600); err != nil {
					t.Fatal(err)
				}
				qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2",
					"-o", fmt.Sprintf("cluster_size=%d,compression_type=%s", size, typ.name), raw, img)
				im := readImage(t, img)
				buf := make([]byte, size)
				n, ok, err := Compress(typ.id, buf, src)
				if err != nil || !ok {
					t.Fatal(typ.name, size, name, ok, err)
				}
				im.compressed(func(_ int, entry uint64, _ []byte) {
					off := (len(im.file)+511)&^511 + 17 // streams may start at any byte
					sectors := (off+n-1)/512 - off/512
					binary.BigEndian.PutUint64(im.file[entry:],
						1<<62|uint64(sectors)<<(70-im.clusterBits)|uint64(off))
					im.file = append(im.file, make([]byte, off-len(im.file))...)
					im.file = append(im.file, buf[:n]...)
					im.file = append(im.file, bytes.Repeat([]byte{0xEE}, 512)...)
				})
				if err := os.WriteFile(img, im.file, 0o600); err != nil {
					t.Fatal(err)
				}
				qemuImg(t, "convert", "-f", "qcow2", "-O", "raw", img, back)
				if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, src) {
					t.Errorf("%s %d %s: QEMU reads something else (%v)", typ.name, size, name, err)
				}
			}
		}
	}
}

func FuzzDecompress(f *testing.F) {
	src := clusterContents(4096)["mixed"]
	buf := make([]byte, 4096)
	for _, typ := range types {
		n, _, err := Compress(typ.id, buf, src)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(typ.id, buf[:n])
	}
	f.Add(Zstd, zstdFrames(f, src, []int{1000, 3096}, true))
	f.Fuzz(func(t *testing.T, typ uint8, data []byte) {
		guarded := make([]byte, 4096+64)
		if err := Decompress(typ%2, guarded[:4096:4096], data); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%v is not ErrCorrupt", err)
		}
		if !bytes.Equal(guarded[4096:], make([]byte, 64)) {
			t.Error("wrote past the cluster")
		}
	})
}

func BenchmarkDecompress(b *testing.B) {
	for _, typ := range types {
		b.Run(typ.name, func(b *testing.B) {
			src := clusterContents(65536)["mixed"]
			buf := make([]byte, 65536)
			n, _, err := Compress(typ.id, buf, src)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(65536)
			b.ReportAllocs()
			for b.Loop() {
				if err := Decompress(typ.id, src, buf[:n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCompress(b *testing.B) {
	for _, typ := range types {
		b.Run(typ.name, func(b *testing.B) {
			src := clusterContents(65536)["letters"]
			buf := make([]byte, 65536)
			b.SetBytes(65536)
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := Compress(typ.id, buf, src); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestStreamSize finds the end of streams that something follows.
func TestStreamSize(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, kind := range []uint8{Zlib, Zstd} {
		for range 200 {
			src := make([]byte, 512<<r.IntN(8))
			for i := range src {
				src[i] = byte(r.IntN(1 + i%7))
			}
			dst := make([]byte, len(src))
			n, ok, err := Compress(kind, dst, src)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			behind := make([]byte, r.IntN(600))
			for i := range behind {
				behind[i] = byte(r.Uint32())
			}
			out := make([]byte, len(src))
			got, err := StreamSize(kind, out, append(dst[:n:n], behind...))
			if err != nil || got != n || !bytes.Equal(out, src) {
				t.Fatalf("type %d: a stream of %d bytes has %d (%v)", kind, n, got, err)
			}
			if err := Decompress(kind, out, dst[:got]); err != nil {
				t.Fatal(err)
			}
			if _, err := StreamSize(kind, out, dst[:n/2]); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("half a stream: %v", err)
			}
		}
	}
	if _, err := StreamSize(7, nil, nil); !errors.Is(err, ErrUnknownType) {
		t.Fatal(err)
	}
}
