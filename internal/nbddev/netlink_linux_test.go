package nbddev

import (
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// kernel stands in for the kernel's end of the netlink socket.
type kernel struct {
	family  genetlink.Family
	noNBD   bool
	got     []genetlink.Message
	answers []genetlink.Message
	fails   error
	joined  uint32
	closed  bool
}

func (k *kernel) GetFamily(name string) (genetlink.Family, error) {
	if k.noNBD || name != "nbd" {
		return genetlink.Family{}, fs.ErrNotExist
	}
	return k.family, nil
}

func (k *kernel) Execute(m genetlink.Message, family uint16, flags netlink.HeaderFlags) ([]genetlink.Message, error) {
	want := netlink.Request | netlink.Acknowledge
	if m.Header.Command == cmdConnect || m.Header.Command == cmdStatus { // the kernel answers these with more than a number
		want = netlink.Request
	}
	if family != k.family.ID || flags != want {
		return nil, unix.EOPNOTSUPP
	}
	k.got = append(k.got, m)
	return k.answers, k.fails
}

func (k *kernel) JoinGroup(group uint32) error { k.joined = group; return nil }

func (k *kernel) Receive() ([]genetlink.Message, []netlink.Message, error) {
	return k.answers, nil, k.fails
}

func (k *kernel) Close() error { k.closed = true; return nil }

func newKernel(t *testing.T) (*kernel, *Control) {
	t.Helper()
	k := &kernel{family: genetlink.Family{ID: 27, Groups: []genetlink.MulticastGroup{{ID: 9, Name: "nbd_mc_group"}}}}
	c, err := open(k)
	if err != nil {
		t.Fatal(err)
	}
	return k, c
}

// unhex makes what stands between spaces one message.
func unhex(t *testing.T, text string) []byte {
	t.Helper()
	p, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestConnect compares what goes to the kernel with the bytes that linux/nbd-netlink.h describes.
func TestConnect(t *testing.T) {
	if !littleEndian() {
		t.Skip("the bytes below are those of a little-endian host")
	}
	k, c := newKernel(t)
	k.answers = []genetlink.Message{{Header: genetlink.Header{Command: 1}, Data: unhex(t, "0800 0100 05000000")}}
	index, err := c.Connect(Config{
		Index: 3, Size: 1 << 30, BlockSize: 4096, Flags: 0x16d, Timeout: 1500 * time.Millisecond, DeadTimeout: time.Minute,
		DisconnectOnClose: true, Identifier: "me",
	}, []int{7, 8})
	if err != nil || index != 5 {
		t.Fatalf("index %d, %v; the kernel said 5", index, err)
	}
	want := []genetlink.Message{{
		Header: genetlink.Header{Command: 1, Version: 1},
		Data: unhex(t, `
			0800 0100 03000000
			0c00 0200 0000004000000000
			0c00 0300 0010000000000000
			0c00 0500 6d01000000000000
			0c00 0600 0200000000000000
			0c00 0400 0200000000000000
			0c00 0800 3c00000000000000
			1c00 0780
				0c00 0180 0800 0100 07000000
				0c00 0180 0800 0100 08000000
			0700 0a00 6d6500 00`),
	}}
	if d := cmp.Diff(want, k.got); d != "" {
		t.Error(d)
	}
}

func littleEndian() bool {
	enc := netlink.NewAttributeEncoder()
	enc.Uint16(1, 1)
	p, err := enc.Encode()
	return err == nil && p[4] == 1
}

// TestConnectAny leaves out what is not said, and learns the index.
func TestConnectAny(t *testing.T) {
	if !littleEndian() {
		t.Skip("the bytes below are those of a little-endian host")
	}
	k, c := newKernel(t)
	if _, err := c.Connect(Config{Index: AnyIndex, Size: 512}, []int{3}); err == nil {
		t.Error("the kernel did not say which device, and that is fine")
	}
	k.got, k.answers = nil, []genetlink.Message{{Data: unhex(t, "0800 0100 02000000")}}
	index, err := c.Connect(Config{Index: AnyIndex, Size: 512}, []int{3})
	if err != nil || index != 2 {
		t.Fatalf("index %d, %v", index, err)
	}
	want := unhex(t, `0c00 0200 0002000000000000 0c00 0300 0002000000000000 0c00 0500 0000000000000000
		1000 0780 0c00 0180 0800 0100 03000000`)
	if d := cmp.Diff(want, k.got[0].Data); d != "" {
		t.Error(d)
	}
	if _, err := c.Connect(Config{Index: 0}, nil); err == nil {
		t.Error("a device without connections is accepted")
	}
}

func TestReconnectAndDisconnect(t *testing.T) {
	if !littleEndian() {
		t.Skip("the bytes below are those of a little-endian host")
	}
	k, c := newKernel(t)
	if err := c.Reconnect(Config{Index: 1, DeadTimeout: time.Second}, []int{4}); err != nil {
		t.Fatal(err)
	}
	if err := c.Disconnect(6); err != nil {
		t.Fatal(err)
	}
	want := []genetlink.Message{
		{Header: genetlink.Header{Command: 3, Version: 1}, Data: unhex(t, `0800 0100 01000000 0c00 0800 0100000000000000
			1000 0780 0c00 0180 0800 0100 04000000`)},
		{Header: genetlink.Header{Command: 2, Version: 1}, Data: unhex(t, "0800 0100 06000000")},
	}
	if d := cmp.Diff(want, k.got); d != "" {
		t.Error(d)
	}
}

func TestStatus(t *testing.T) {
	if !littleEndian() {
		t.Skip("the bytes below are those of a little-endian host")
	}
	k, c := newKernel(t)
	k.answers = []genetlink.Message{{Header: genetlink.Header{Command: 5}, Data: unhex(t, `2c00 0980
		1400 0180 0800 0100 00000000 0500 0200 01000000
		1400 0180 0800 0100 0c000000 0500 0200 00000000`)}}
	list, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Status{{0, true}, {12, false}}, list); d != "" {
		t.Error(d)
	}
	k.answers[0].Data = k.answers[0].Data[:30]
	if list, err := c.Status(); err == nil {
		t.Errorf("an answer that is cut short means %v", list)
	}
}

func TestWatch(t *testing.T) {
	if !littleEndian() {
		t.Skip("the bytes below are those of a little-endian host")
	}
	k, c := newKernel(t)
	if err := c.Watch(); err != nil || k.joined != 9 {
		t.Fatalf("group %d, %v", k.joined, err)
	}
	k.answers = []genetlink.Message{
		{Header: genetlink.Header{Command: 5}, Data: unhex(t, "0800 0100 01000000")},
		{Header: genetlink.Header{Command: 4}, Data: unhex(t, "0800 0100 02000000")},
		{Header: genetlink.Header{Command: 4}, Data: unhex(t, "0800 01")},
	}
	dead, err := c.Receive()
	if err != nil || !cmp.Equal(dead, []int{2}) {
		t.Errorf("dead: %v, %v", dead, err)
	}
	k.family.Groups = nil
	c.family = k.family
	if err := c.Watch(); err == nil {
		t.Error("there is no group, and that is fine")
	}
	if err := c.Close(); err != nil || !k.closed {
		t.Error("Close does not close the socket")
	}
}

func TestErrors(t *testing.T) {
	if _, err := open(&kernel{noNBD: true}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without the family: %v", err)
	}
	k, c := newKernel(t)
	k.fails = unix.EBUSY
	if _, err := c.Connect(Config{Index: 1, Size: 512}, []int{1}); !errors.Is(err, ErrBusy) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("busy: %v", err)
	}
	k.fails = unix.EINVAL
	if err := c.Disconnect(1); !errors.Is(err, ErrNotConnected) {
		t.Errorf("no such device: %v", err)
	}
	if _, err := c.Status(); !errors.Is(err, unix.EINVAL) || errors.Is(err, ErrNotConnected) {
		t.Errorf("status: %v", err)
	}
}

func TestIndexOf(t *testing.T) {
	for name, want := range map[string]int{"/dev/nbd0": 0, "/nowhere/nbd15": 15} {
		if got, err := IndexOf(name); err != nil || got != want {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
	plain := filepath.Join(t.TempDir(), "nbd1")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/dev/null", "/dev/nbd", "/dev/nbd0p1", "/dev/nbdx", "/dev/nbd9999999", plain} {
		if got, err := IndexOf(name); err == nil {
			t.Errorf("%s: %d", name, got)
		}
	}
}

// TestConnectOldRefuses is given something that is no NBD device: nothing may be left open or changed.
func TestConnectOldRefuses(t *testing.T) {
	for _, name := range []string{"/dev/null", "/nowhere/nbd0"} {
		if _, err := ConnectOld(name, Config{Size: 512}, []int{0}); err == nil {
			t.Errorf("%s is connected", name)
		}
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	DisconnectFile(f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
