package ciphers_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/luks"
	_ "github.com/droverproject/drover/luks/ciphers"
)

const passphrase = "a passphrase"

// qemu runs one of QEMU's tools; the test is skipped where there is none. On a busy machine qemu-img may fail to measure
// its own speed, which it needs when it makes a key: it is asked again.
func qemu(t *testing.T, tool string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", tool)
		}
		t.Skipf("%s is not installed", tool)
	}
	args = append([]string{args[0], "--object", "secret,id=s,data=" + passphrase}, args[1:]...)
	if tool == "qemu-io" {
		args = append(args[1:3], append(args[:1:1], args[3:]...)...)
	}
	for try := 1; ; try++ {
		out, err := exec.Command(tool, args...).CombinedOutput()
		if err == nil {
			return string(out)
		}
		if try == 20 || !strings.Contains(string(out), "Unable to get accurate CPU usage") {
			t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
		}
	}
}

type spec struct{ cipher, mode, iv, ivHash, hash string }

// specs is a sample of all ways to encrypt, in which each part occurs. QEMU has no keys of 192 bits outside XTS: it ends
// with a failed assertion.
var specs = []spec{
	{"aes-256", "xts", "plain64", "", "sha256"},
	{"aes-128", "xts", "plain", "", "sha1"},
	{"aes-192", "xts", "plain64", "", "sha512"},
	{"aes-256", "xts", "essiv", "sha256", "sha384"},
	{"aes-256", "cbc", "essiv", "sha256", "sha224"},
	{"aes-128", "cbc", "essiv", "md5", "md5"},
	{"aes-128", "cbc", "plain64", "", "ripemd160"},
	{"aes-256", "cbc", "plain", "", "sha256"},
	{"aes-256", "ctr", "plain64", "", "sha256"},
	{"aes-128", "ctr", "essiv", "sha256", "sha1"},
	{"aes-256", "ecb", "plain64", "", "sha256"},
	{"twofish-256", "xts", "plain64", "", "sha256"},
	{"twofish-192", "xts", "plain", "", "sha256"},
	{"twofish-128", "cbc", "essiv", "sha256", "sha1"},
	{"twofish-256", "ctr", "plain64", "", "ripemd160"},
	{"cast5-128", "cbc", "plain64", "", "sha256"},
	{"cast5-128", "cbc", "plain", "", "sha1"},
	{"cast5-128", "cbc", "essiv", "md5", "sha1"},
	{"cast5-128", "ctr", "plain64", "", "sha1"},
	{"cast5-128", "ecb", "plain64", "", "sha1"},
}

func (s spec) String() string {
	return strings.Join([]string{s.cipher, s.mode, s.iv, s.ivHash, s.hash}, "_")
}

const dataSize = 128 << 10

func payload() []byte { return bytes.Repeat([]byte{0x5a}, dataSize) }

func TestQEMUReadsWhatIsCreatedHere(t *testing.T) {
	for _, s := range specs {
		t.Run(s.String(), func(t *testing.T) {
			name, bits, _ := strings.Cut(s.cipher, "-")
			o := luks.CreateOptions{Cipher: name, Mode: s.mode, IVGen: s.iv, IVHash: s.ivHash, Hash: s.hash, Cost: luks.Cost{Iterations: 1000}}
			if _, err := fmt.Sscan(bits, &o.KeyBits); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "v.luks")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			v, err := luks.Create(t.Context(), f, []byte(passphrase), o)
			if err != nil {
				t.Fatal(err)
			}
			start, err := o.Length()
			if err != nil {
				t.Fatal(err)
			}
			data := payload()
			v.Cipher().EncryptSectors(data, data, 0)
			if _, err := f.WriteAt(data, start); err != nil {
				t.Fatal(err)
			}
			out := qemu(t, "qemu-io", "-c", fmt.Sprintf("read -P 0x5a 0 %d", dataSize), "--image-opts",
				"driver=luks,key-secret=s,file.filename="+path)
			if strings.Contains(out, "Pattern verification failed") {
				t.Error(out)
			}
		})
	}
}

// fromQEMU is a smaller sample, for QEMU takes seconds to make a key, however cheap: each cipher occurs.
var fromQEMU = []spec{
	{"aes-256", "xts", "essiv", "sha256", "sha384"},
	{"twofish-256", "xts", "plain64", "", "ripemd160"},
	{"cast5-128", "cbc", "plain", "", "sha1"},
}

func TestWhatQEMUCreatesIsReadHere(t *testing.T) {
	for _, s := range fromQEMU {
		t.Run(s.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "v.luks")
			o := fmt.Sprintf("key-secret=s,iter-time=10,cipher-alg=%s,cipher-mode=%s,ivgen-alg=%s,hash-alg=%s", s.cipher, s.mode, s.iv, s.hash)
			if s.ivHash != "" {
				o += ",ivgen-hash-alg=" + s.ivHash
			}
			qemu(t, "qemu-img", "create", "-q", "-f", "luks", "-o", o, path, fmt.Sprint(dataSize))
			qemu(t, "qemu-io", "-c", fmt.Sprintf("write -P 0x5a 0 %d", dataSize), "--image-opts", "driver=luks,key-secret=s,file.filename="+path)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			v, err := luks.Open(t.Context(), f, []byte(passphrase), luks.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := luks.Open(t.Context(), f, []byte("wrong"), luks.Limits{}); !errors.Is(err, luks.ErrWrongKey) {
				t.Errorf("wrong passphrase: %v", err)
			}
			h := v.Header()
			if h.CipherAlg() != s.cipher || h.Hash != s.hash || h.Spec().Mode != s.mode || h.Spec().IVGen != s.iv || h.Spec().IVHash != s.ivHash {
				t.Errorf("header says %+v", h)
			}
			data := make([]byte, dataSize)
			if _, err := f.ReadAt(data, int64(h.PayloadOffset)*luks.SectorSize); err != nil {
				t.Fatal(err)
			}
			v.Cipher().DecryptSectors(data, data, 0)
			if !bytes.Equal(data, payload()) {
				t.Error("wrong data")
			}
		})
	}
}

// QEMU opens a volume whose keys were added, changed and erased here, and the other way round.
func TestQEMUAgreesOnKeySlots(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.luks")
	qemu(t, "qemu-img", "create", "-q", "-f", "luks", "-o", "key-secret=s,iter-time=10", path, "1M")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cheap := luks.Cost{Iterations: 1000}
	v, err := luks.Open(t.Context(), f, []byte(passphrase), luks.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.AddKey(t.Context(), 7, []byte("temporary"), cheap, false); err != nil {
		t.Fatal(err)
	}
	if _, err := v.ChangeKey(t.Context(), []byte(passphrase), []byte("other"), cheap); err != nil {
		t.Fatal(err)
	}
	if _, err := v.AddKey(t.Context(), 3, []byte(passphrase), cheap, false); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"other", "temporary"} { // QEMU erases them, its own key being the one in slot 3
		qemu(t, "qemu-img", "amend", "--object", "secret,id=old,data="+p, "--image-opts", "-o", "state=inactive,old-secret=old",
			"driver=luks,key-secret=s,file.filename="+path)
		if _, err := luks.Open(t.Context(), f, []byte(p), luks.Limits{}); !errors.Is(err, luks.ErrWrongKey) {
			t.Errorf("%q after QEMU erased it: %v", p, err)
		}
	}
	if _, err := luks.Open(t.Context(), f, []byte(passphrase), luks.Limits{}); err != nil {
		t.Error(err)
	}
}
