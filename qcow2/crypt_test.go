package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

const secret = "open sesame"

var cheapKey = luks.Cost{Iterations: 1000}

// encryptions are ways to encrypt, some of them with little key material, for speed.
var encryptions = []*qcow2.EncryptCreateOptions{
	{Format: "aes", Secret: []byte(secret)},
	{Format: "luks", Secret: []byte(secret), LUKS: luks.CreateOptions{Cost: cheapKey}},
	{Secret: []byte(secret), LUKS: luks.CreateOptions{KeyBits: 128, Mode: "cbc", IVGen: "essiv", Hash: "sha1", Cost: cheapKey}},
	{Secret: []byte(secret), LUKS: luks.CreateOptions{KeyBits: 128, Mode: "ctr", IVGen: "plain", Hash: "sha1", Cost: cheapKey}},
}

// qemuOpts are the arguments with which QEMU's tools find an encrypted image.
func qemuOpts(path string) []string {
	return []string{"--object", "secret,id=s,data=" + secret, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=" + path}
}

// qemuCompareEncrypted has stock qemu-img check an encrypted image and compare it with the model.
func (h *harness) qemuCompareEncrypted() {
	h.t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return
	}
	dir := h.t.TempDir()
	saveFile(h.t, h.file, filepath.Join(dir, "image.qcow2"))
	saveData(h.t, h.data, dir)
	h.must("saving", os.WriteFile(filepath.Join(dir, "model.raw"), h.model, 0o600))
	if h.base != nil {
		h.must("saving", os.WriteFile(filepath.Join(dir, "base.raw"), h.base, 0o600))
	}
	qemu(h.t, dir, "qemu-img", append([]string{"check"}, qemuOpts("image.qcow2")...)...)
	h.compareWithQEMU(dir)
}

// compareWithQEMU compares image.qcow2 with model.raw in dir.
func (h *harness) compareWithQEMU(dir string) {
	h.t.Helper()
	args := append([]string{"convert"}, qemuOpts("image.qcow2")...)
	qemu(h.t, dir, "qemu-img", append(args, "-O", "raw", "read.raw")...)
	got, err := os.ReadFile(filepath.Join(dir, "read.raw"))
	h.must("reading what QEMU reads", err)
	if !bytes.Equal(got, h.model) {
		h.t.Fatalf("%v: QEMU reads other content", h.v)
	}
}

// TestEncryptedModel is the model test with encryption always on.
func TestEncryptedModel(t *testing.T) {
	for i, e := range encryptions {
		for k := range 6 {
			t.Run(fmt.Sprintf("%d/%d", i, k), func(t *testing.T) {
				t.Parallel()
				r := rand.New(rand.NewPCG(uint64(i), uint64(k)))
				v := drawVariant(r)
				for v.create.DataFileRaw || v.data && v.create.Preallocation != qcow2.PreallocOff {
					v = drawVariant(r)
				}
				v.create.Encrypt = e
				h := newHarness(t, r, v)
				for range 120 {
					h.step()
				}
				h.finish()
			})
		}
	}
}

func createEncrypted(t *testing.T, e *qcow2.EncryptCreateOptions, o qcow2.CreateOptions) *storage.MemFile {
	t.Helper()
	f := storage.NewMemFile("secret.qcow2")
	o.Encrypt = e
	if err := qcow2.Create(t.Context(), f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func openEncrypted(t *testing.T, f storage.File, o qcow2.Options) *qcow2.Image {
	t.Helper()
	o.Encrypt = &qcow2.EncryptOptions{Secret: []byte(secret)}
	im, err := qcow2.Open(t.Context(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = im.Close() })
	return im
}

// Nothing of what the guest writes is in the file: not as data, not around partial writes, not after zeroing.
func TestNoPlaintextInTheFile(t *testing.T) {
	mark := []byte("a mark that is nowhere else")
	for _, e := range encryptions {
		for _, o := range []qcow2.CreateOptions{{Size: 1 << 20}, {Size: 1 << 20, ExtendedL2: true}, {Size: 1 << 20, Version: 2}} {
			f := createEncrypted(t, e, o)
			base := bytes.Repeat(mark, 1<<20/len(mark))
			im := openEncrypted(t, keepOpen{f}, qcow2.Options{Backing: blocktest.NewBytes(base)})
			r := rand.New(rand.NewPCG(1, 1))
			for range 60 {
				off := r.Int64N(1<<20 - 5000)
				if err := im.WriteAt(t.Context(), bytes.Repeat(mark, 1+r.IntN(150)), off, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			b := fileBytes(t, f)
			if at := bytes.Index(b, mark[:16]); at >= 0 {
				t.Errorf("%s: plaintext at host offset %#x", e.Format, at)
			}
			if bytes.Contains(b, []byte(secret)) {
				t.Errorf("%s: the secret is in the file", e.Format)
			}
			checkFile(t, f)
		}
	}
}

// Whatever the host holds, clusters that the guest has not written read as zeroes.
func TestPreallocatedEncryptedReadsAsZeroes(t *testing.T) {
	for _, e := range encryptions {
		for _, mode := range []qcow2.Preallocation{qcow2.PreallocMetadata, qcow2.PreallocFalloc, qcow2.PreallocFull} {
			for _, o := range []qcow2.CreateOptions{{}, {Version: 2}, {ExtendedL2: true}, {ClusterSize: 512}} {
				o.Size, o.Preallocation = 300<<10+512, mode
				f := createEncrypted(t, e, o)
				im := openEncrypted(t, keepOpen{f}, qcow2.Options{})
				model := make([]byte, o.Size)
				got := make([]byte, o.Size)
				compare := func(what string) {
					t.Helper()
					if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, model) {
						t.Fatalf("%s: %+v: wrong content (%v)", what, o, err)
					}
				}
				compare("new")
				copy(model[70000:], "some bytes")
				if err := im.WriteAt(t.Context(), []byte("some bytes"), 70000, 0); err != nil {
					t.Fatal(err)
				}
				compare("written")
				if err := im.Resize(t.Context(), o.Size*2, qcow2.ResizeOptions{Preallocation: mode}); err != nil {
					t.Fatal(err)
				}
				model, got = append(model, make([]byte, o.Size)...), make([]byte, o.Size*2)
				compare("grown")
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				checkFile(t, f)
			}
		}
	}
}

// Writers of different parts of one sector do not undo each other's work.
func TestPartsOfASectorSideBySide(t *testing.T) {
	f := createEncrypted(t, encryptions[1], qcow2.CreateOptions{Size: 1 << 20, Preallocation: qcow2.PreallocOff})
	im := openEncrypted(t, keepOpen{f}, qcow2.Options{})
	if err := im.WriteAt(t.Context(), make([]byte, 1<<16), 0, 0); err != nil {
		t.Fatal(err)
	}
	const parts, rounds = 8, 50
	var wg sync.WaitGroup
	for k := range parts {
		wg.Go(func() {
			n := 512 / (parts / 2)
			off := int64(k) * int64(n) // two sectors in all, and one writer of whole sectors behind them
			if k == parts-1 {
				off, n = 1024, 1024
			}
			for i := range rounds {
				p := bytes.Repeat([]byte{byte(k*rounds + i)}, n)
				if err := im.WriteAt(context.Background(), p, off, 0); err != nil {
					t.Error(err)
				}
				got := make([]byte, n)
				if err := im.ReadAt(context.Background(), got, off); err != nil || !bytes.Equal(got, p) {
					t.Errorf("writer %d: reads something else than it wrote (%v)", k, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// An encrypted image opened without its key tells what needs no key, and fails what does.
func TestWithoutTheKey(t *testing.T) {
	for _, e := range encryptions {
		f := createEncrypted(t, e, qcow2.CreateOptions{Size: 1 << 20})
		im := openEncrypted(t, keepOpen{f}, qcow2.Options{})
		if err := im.WriteAt(t.Context(), []byte("data"), 70000, 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(t.Context(), keepOpen{f}, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if encrypted, unlocked := im.Encrypted(); !encrypted || unlocked {
			t.Errorf("encrypted %v, unlocked %v", encrypted, unlocked)
		}
		b := make([]byte, 512)
		if err := im.ReadAt(t.Context(), b, 70000&^511); !errors.Is(err, qcow2.ErrNoKey) {
			t.Errorf("read: %v", err)
		}
		if err := im.TryReadAt(b, 70000&^511); !errors.Is(err, block.ErrWouldBlock) {
			t.Errorf("try to read: %v", err)
		}
		if !bytes.Equal(b, make([]byte, 512)) {
			t.Error("a read that failed returned bytes of the file")
		}
		for _, off := range []int64{0, 70000, 200000} {
			if err := im.WriteAt(t.Context(), b, off, 0); !errors.Is(err, qcow2.ErrNoKey) {
				t.Errorf("write at %d: %v", off, err)
			}
		}
		if err := im.ReadAt(t.Context(), b, 0); err != nil {
			t.Errorf("read of what nothing is mapped for: %v", err)
		}
		if _, err := im.AddKey(t.Context(), qcow2.AnyKeySlot, []byte("x"), cheapKey, false); !errors.Is(err, qcow2.ErrNoKey) && !errors.Is(err, qcow2.ErrNoKeySlots) {
			t.Errorf("adding a key: %v", err)
		}
		places := 0
		if err := im.Extents(t.Context(), 0, 1<<20, func(x block.Extent) bool {
			if x.HasHost {
				t.Errorf("extent %+v has a place on the host", x)
			}
			if x.Data {
				places++
			}
			return true
		}); err != nil || places != 1 {
			t.Errorf("extents: %d of data, %v", places, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		checkFile(t, f)
	}
}

func TestOpenRefusesEncryptionOptions(t *testing.T) {
	luksFile, aesFile, plain := createEncrypted(t, encryptions[2], qcow2.CreateOptions{Size: 1 << 20}),
		createEncrypted(t, encryptions[0], qcow2.CreateOptions{Size: 1 << 20}), createEncrypted(t, nil, qcow2.CreateOptions{Size: 1 << 20})
	for _, c := range []struct {
		f    *storage.MemFile
		o    qcow2.EncryptOptions
		want string
	}{
		{luksFile, qcow2.EncryptOptions{Secret: []byte("wrong")}, "Invalid password"},
		{luksFile, qcow2.EncryptOptions{Format: "aes", Secret: []byte(secret)}, "Header reported 'luks'"},
		{aesFile, qcow2.EncryptOptions{Format: "luks", Secret: []byte(secret)}, "Header reported 'aes'"},
		{plain, qcow2.EncryptOptions{Format: "luks", Secret: []byte(secret)}, "No encryption in image header"},
		{luksFile, qcow2.EncryptOptions{Secret: []byte(secret), Limits: luks.Limits{MaxIterations: 10}}, "more than the limit"},
	} {
		im, err := qcow2.Open(t.Context(), keepOpen{c.f}, qcow2.Options{Encrypt: &c.o})
		if err == nil {
			_ = im.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%+v: %v", c.o.Format, err)
		}
	}
	if _, err := qcow2.Open(t.Context(), keepOpen{luksFile}, qcow2.Options{Encrypt: &qcow2.EncryptOptions{}}); !errors.Is(err, qcow2.ErrWrongKey) {
		t.Errorf("empty secret: %v", err)
	}
}

func TestCreateRefusesEncryption(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{Encrypt: &qcow2.EncryptCreateOptions{Format: "rot13"}},
		{Encrypt: &qcow2.EncryptCreateOptions{LUKS: luks.CreateOptions{Cipher: "serpent"}}},
		{Encrypt: encryptions[0], DataFile: "d", DataFileRaw: true, DataStorage: storage.NewMemFile("d")},
		{Encrypt: encryptions[0], DataFile: "d", Preallocation: qcow2.PreallocMetadata, DataStorage: storage.NewMemFile("d")},
	} {
		o.Size = 1 << 20
		if err := o.Validate(); !errors.Is(err, qcow2.ErrInvalidOption) {
			t.Errorf("%+v: %v", o.Encrypt, err)
		}
	}
}

// The key slots of an image in use change, and everything else goes on.
func TestKeySlotsOfAnOpenImage(t *testing.T) {
	f := createEncrypted(t, encryptions[2], qcow2.CreateOptions{Size: 1 << 20})
	im := openEncrypted(t, keepOpen{f}, qcow2.Options{})
	data := bytes.Repeat([]byte("data"), 1000)
	if err := im.WriteAt(t.Context(), data, 5000, 0); err != nil {
		t.Fatal(err)
	}
	stop, wrote := make(chan struct{}), make(chan error, 1)
	go func() { // requests go on meanwhile
		var err error
		for i := 0; err == nil; i++ {
			select {
			case <-stop:
				wrote <- err
				return
			default:
				err = im.WriteAt(context.Background(), data, 500000+int64(i%100)*4096, 0)
			}
		}
		wrote <- err
	}()
	ctx := t.Context()
	if n, err := im.AddKey(ctx, qcow2.AnyKeySlot, []byte("two"), cheapKey, false); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := im.AddKey(ctx, 5, []byte("five"), cheapKey, false); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	if err := im.ChangeKey(ctx, []byte("two"), []byte("three"), cheapKey); err != nil {
		t.Fatal(err)
	}
	if err := im.EraseKeySlot(ctx, 5, false); err != nil {
		t.Fatal(err)
	}
	if err := im.EraseKey(ctx, []byte("nobody's"), false); !errors.Is(err, qcow2.ErrWrongKey) {
		t.Errorf("erasing a key that is none: %v", err)
	}
	if err := im.EraseKey(ctx, []byte(secret), false); err != nil {
		t.Fatal(err)
	}
	if err := im.EraseKey(ctx, []byte("three"), false); !errors.Is(err, luks.ErrLastSlot) {
		t.Errorf("erasing the last key: %v", err)
	}
	close(stop)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, f)
	for key, opens := range map[string]bool{secret: false, "two": false, "five": false, "three": true} {
		im, err := qcow2.Open(ctx, keepOpen{f}, qcow2.Options{Encrypt: &qcow2.EncryptOptions{Secret: []byte(key)}})
		if opens != (err == nil) {
			t.Errorf("%q: %v", key, err)
		}
		if err != nil {
			continue
		}
		got := make([]byte, len(data))
		if err := im.ReadAt(ctx, got, 5000); err != nil || !bytes.Equal(got, data) {
			t.Errorf("data differ (%v)", err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	info, err := qcow2.ReadInfo(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	active := 0
	for _, s := range info.Encryption.LUKS.Slots {
		if s.Active {
			active++
		}
	}
	if active != 1 {
		t.Errorf("%d slots are active", active)
	}
}

// A mapping that leads into the key slots must not let the guest write over them.
func TestGuestCannotReachTheKeySlots(t *testing.T) {
	f := createEncrypted(t, encryptions[2], qcow2.CreateOptions{Size: 1 << 20})
	im := openEncrypted(t, keepOpen{f}, qcow2.Options{})
	if err := im.WriteAt(t.Context(), make([]byte, 65536), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	l1 := binary.BigEndian.Uint64(fileBytes(t, f)[40:])
	l2 := binary.BigEndian.Uint64(fileBytes(t, f)[l1:]) &^ (1 << 63)
	poke(t, f, int64(l2), 1<<63|0x30000) // where the key slots lie
	before := fileBytes(t, f)
	im = openEncrypted(t, keepOpen{f}, qcow2.Options{})
	var corrupt *qcow2.CorruptError
	if err := im.WriteAt(t.Context(), make([]byte, 512), 0, 0); !errors.As(err, &corrupt) {
		t.Errorf("write: %v", err)
	}
	if !bytes.Equal(fileBytes(t, f)[0x30000:0x40000], before[0x30000:0x40000]) {
		t.Error("the key slots have changed")
	}
}

// TestHostileCryptoExtension has the header extension lead to where no key slots are, or to a part of them.
func TestHostileCryptoExtension(t *testing.T) {
	good := createEncrypted(t, encryptions[2], qcow2.CreateOptions{Size: 1 << 20})
	ext := bytes.Index(fileBytes(t, good), []byte{0x05, 0x37, 0xbe, 0x77})
	if ext < 0 {
		t.Fatal("no crypto header extension")
	}
	for _, c := range [][2]uint64{
		{0x7fffffffffff0000, 1 << 20}, {0xffffffffffff0000, 1 << 20}, {0, 1 << 20}, {1 << 30, 1 << 20},
		{0x30000, 0}, {0x30000, 600}, {0x30000, 1<<64 - 1},
	} {
		f := storage.NewMemFile("hostile.qcow2")
		if _, err := f.WriteAt(fileBytes(t, good), 0); err != nil {
			t.Fatal(err)
		}
		poke(t, f, int64(ext+8), c[0])
		poke(t, f, int64(ext+16), c[1])
		im, err := qcow2.Open(t.Context(), keepOpen{f}, qcow2.Options{ReadOnly: true, Encrypt: &qcow2.EncryptOptions{Secret: []byte(secret)}})
		if err == nil {
			_ = im.Close()
			if c[0] != 0x30000 || c[1] < 1<<20 {
				t.Errorf("%x: opened", c)
			}
		}
		_, _ = qcow2.ReadInfo(t.Context(), f) // must return
	}
}

// qemuCreate has QEMU create an encrypted image; on a busy machine it may fail to measure its own speed.
func qemuCreate(t *testing.T, dir, opts string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		qemu(t, dir, "qemu-img")
	}
	for try := 1; ; try++ {
		cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data="+secret, "-o",
			"encrypt.key-secret=s,"+opts, "image.qcow2", "4M")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err == nil {
			return
		}
		if try == 20 || !strings.Contains(string(out), "Unable to get accurate CPU usage") {
			t.Fatalf("qemu-img create: %v: %s", err, out)
		}
	}
}

// TestEncryptedImagesOfQEMU works on images that QEMU created and wrote, and has QEMU read the result.
func TestEncryptedImagesOfQEMU(t *testing.T) {
	if testing.Short() {
		t.Skip("one client after another: the long form shows it")
	}
	for i, opts := range []string{
		"encrypt.format=aes", "encrypt.format=aes,compat=0.10,cluster_size=4k", "encrypt.format=luks,encrypt.iter-time=10",
		"encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.hash-alg=sha1,extended_l2=on",
		"encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-mode=ctr,encrypt.hash-alg=sha512,data_file=image.data",
	} {
		t.Run(opts, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			qemuCreate(t, dir, opts)
			model := make([]byte, 4<<20)
			var cmds []string
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for k := range 30 {
				off, n := 512*r.IntN(8000), 512*(1+r.IntN(150))
				cmds = append(cmds, "-c", fmt.Sprintf("write -P %d %d %d", k+1, off, n))
				copy(model[off:off+n], bytes.Repeat([]byte{byte(k + 1)}, n))
			}
			qemu(t, dir, "qemu-io", append(cmds, qemuOpts("image.qcow2")...)...)
			h := &harness{t: t, r: r, v: variant{create: qcow2.CreateOptions{ClusterSize: 65536, Encrypt: encryptions[0]}},
				file: loadFile(t, filepath.Join(dir, "image.qcow2")), model: model}
			if strings.Contains(opts, "data_file") {
				h.data, h.v.data = storage.NewMemFile("image.data"), true
				if _, err := h.data.WriteAt(fileBytes(t, loadFile(t, filepath.Join(dir, "image.data"))), 0); err != nil {
					t.Fatal(err)
				}
			}
			h.open()
			got := make([]byte, len(model))
			if err := h.im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, model) {
				t.Fatalf("content differs (%v)", err)
			}
			for range 80 {
				h.step()
			}
			h.finish()
		})
	}
}
