package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
)

// qemuNBDRun runs drover under the name of qemu-nbd.
func qemuNBDRun(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Main(t.Context(), "/usr/bin/qemu-nbd", args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// TestQemuNBDRefuses compares what is said of mistakes with what qemu-nbd 7.2 says.
func TestQemuNBDRefuses(t *testing.T) {
	const hint = "qemu-nbd: Try `qemu-nbd --help' for more information.\n"
	for _, c := range []struct{ args, want string }{
		{"", "qemu-nbd: Invalid number of arguments\nTry `qemu-nbd --help' for more information.\n"},
		{"--nope", "qemu-nbd: unrecognized option '--nope'\n" + hint},
		{"-y", "qemu-nbd: invalid option -- 'y'\n" + hint},
		{"--s", "qemu-nbd: option '--s' is ambiguous; possibilities: '--socket' '--snapshot' '--shared' '--selinux-label'\n" + hint},
		{"-e x --nope", "qemu-nbd: Invalid shared device number 'x'\n"},
		{"-e -1", "qemu-nbd: Invalid shared device number '-1'\n"},
		{"-k s", "qemu-nbd: socket path must be absolute\n"},
		{"-n --cache=none", "qemu-nbd: -n and --cache can only be specified once\n"},
		{"--cache=foo", "qemu-nbd: Invalid cache mode `foo'\n"},
		{"--aio=foo", "qemu-nbd: Invalid aio mode 'foo'\n"},
		{"--aio=threads --aio=threads", "qemu-nbd: --aio can only be specified once\n"},
		{"--discard=foo", "qemu-nbd: Invalid discard mode `foo'\n"},
		{"--discard=off --discard=on", "qemu-nbd: --discard can only be specified once\n"},
		{"--detect-zeroes=foo", "qemu-nbd: Failed to parse detect_zeroes mode: invalid parameter value: foo\n"},
		{"--detect-zeroes=unmap", "qemu-nbd: setting detect-zeroes to unmap is not allowed without setting discard operation to unmap\n"},
		{"-o 20M", "qemu-nbd: Invalid offset '20M'\n"},
		{"-x " + strings.Repeat("n", 4097), "qemu-nbd: export name '" + strings.Repeat("n", 4097) + "' too long\n"},
		{"-D " + strings.Repeat("n", 4097), "qemu-nbd: export description '" + strings.Repeat("n", 4097) + "' too long\n"},
		{"-l snapshot.id=1,foo=2", "qemu-nbd: Invalid parameter 'foo'\nqemu-nbd: Failed in parsing snapshot param `snapshot.id=1,foo=2'\n"},
		{"-L a", "qemu-nbd: List mode is incompatible with a file name\n"},
		{"-L -A", "qemu-nbd: List mode is incompatible with per-device settings\n"},
		{"-L --fork", "qemu-nbd: List mode is incompatible with forking\n"},
		{"--tls-creds=t a", "qemu-nbd: Failed to get TLS creds: No TLS credentials with id 't'\n"},
		{"--tls-authz=t a", "qemu-nbd: --tls-authz is not permitted without --tls-creds\n"},
		{"--tls-hostname=t a", "qemu-nbd: --tls-hostname is not permitted without --tls-creds\n"},
		{"--tls-hostname=t --tls-creds=t a", "qemu-nbd: TLS hostname is only supported with export list\n"},
		{"--tls-creds=t -c /dev/nbd0 a", "qemu-nbd: TLS is not supported with a host device\n"},
		{"--object foo,id=x", "qemu-nbd: Parameter 'qom-type' does not accept value 'foo'\n"},
		{"--object tls-creds-x509", "qemu-nbd: Parameter 'id' is missing\n"},
		{"--object tls-creds-x509,id=t", "qemu-nbd: Missing 'dir' property value\n"},
		{"--object tls-creds-x509,id=t,endpoint=x", "qemu-nbd: Parameter 'endpoint' does not accept value 'x'\n"},
		{"--object tls-creds-x509,id=t,foo=x", "qemu-nbd: Parameter 'foo' is unexpected\n"},
		{"--object authz-simple,id=z", "qemu-nbd: Parameter 'identity' is missing\n"},
		{"--object authz-list,id=z,policy=x", "qemu-nbd: Parameter 'policy' does not accept value 'x'\n"},
		{"--object authz-listfile,id=z", "qemu-nbd: Parameter 'filename' is missing\n"},
		{"--object authz-pam,id=z,service=x", "qemu-nbd: invalid object type: authz-pam\n"},
		{"--object authz-list,id=z --object authz-list,id=z", "qemu-nbd: attempt to add duplicate property 'z' to object (type 'container')\n"},
		{"--object secret,id=s,data=x --tls-creds s a", "qemu-nbd: Failed to get TLS creds: Object with id 's' is not TLS credentials\n"},
		{"-d /nowhere/nbd0", "qemu-nbd: Cannot open /nowhere/nbd0: No such file or directory\n"},
		{"-L -k /nowhere/s", "qemu-nbd: Failed to connect to '/nowhere/s': No such file or directory\n"},
		{"-k /nowhere/s a", "qemu-nbd: Failed to bind socket to /nowhere/s: No such file or directory\n"},
	} {
		code, out, errs := qemuNBDRun(t, strings.Fields(c.args)...)
		if code != 1 || out != "" || errs != c.want {
			t.Errorf("qemu-nbd %.100s: code %d, %q, %q, want %q", c.args, code, out, errs, c.want)
		}
	}
}

// TestQemuNBDOpening is refused by the image, once the socket is there, and leaves no socket behind.
func TestQemuNBDOpening(t *testing.T) {
	dir := t.TempDir()
	socket, raw := filepath.Join(dir, "s"), filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{filepath.Join(dir, "none")}, "Failed to blk_new_open 'DIR/none': Could not open 'DIR/none': No such file or directory\n"},
		{[]string{"-f", "foo", raw}, "Failed to blk_new_open 'DIR/raw': Unknown driver 'foo'\n"},
		{[]string{"-f", "qcow2", raw}, "Failed to blk_new_open 'DIR/raw': Image is not in qcow2 format\n"},
		{[]string{"-f", "raw", "--image-opts", raw}, "--image-opts and -f are mutually exclusive\n"},
		{[]string{"-f", "raw", "--aio=native", raw},
			"Failed to blk_new_open 'DIR/raw': aio=native was specified, but it requires cache.direct=on, which was not specified.\n"},
		{[]string{"-f", "raw", "-o", "8192", raw}, "Offset (8192) cannot be greater than size of the containing file (4096)\n"},
		{[]string{"-f", "raw", "-l", "x", raw},
			"Failed to load snapshot: Block format 'raw' used by device '' does not support temporarily loading internal snapshots\n"},
		{[]string{"-f", "raw", "-B", "b", raw}, "Bitmap 'b' is not found\n"},
		{[]string{"-f", "raw", "--pid-file", filepath.Join(dir, "none/pid"), raw}, "Could not create 'DIR/none/pid': No such file or directory\n"},
	} {
		code, out, errs := qemuNBDRun(t, append([]string{"-k", socket}, c.args...)...)
		want := "qemu-nbd: " + strings.ReplaceAll(c.want, "DIR", dir)
		if code != 1 || out != "" || errs != want {
			t.Errorf("%q: code %d, %q, %q, want %q", c.args, code, out, errs, want)
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Fatalf("%q: the socket is left behind (%v)", c.args, err)
		}
	}
}

func TestQemuNBDParses(t *testing.T) {
	parse := func(args ...string) *qemuNBD {
		t.Helper()
		n := &qemuNBD{app: &app{name: "qemu-nbd"}, shared: 1}
		n.source.noDiscard = true
		if err := n.parse(args); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return n
	}
	n := parse("-tvrsn", "-e0", "-p", "5", "--bind=::1", "-x", "n", "-D", "d", "-o0x200", "-A", "-B", "b", "-Bc", "-f", "raw", "-T", "x",
		"--discard=unmap", "--detect-zeroes=unmap", "--aio=native", "--fork", "--pid-file=p", "disk")
	ok := n.persistent && n.verbose && n.readOnly && n.overlay && n.source.direct && n.shared == 0 && n.port == "5" && n.bind == "::1" &&
		*n.export == "n" && n.description == "d" && n.offset == 512 && n.depth && slices.Equal(n.bitmaps, []string{"b", "c"}) &&
		n.source.format == "raw" && !n.source.noDiscard && n.mode.DetectZeroes == block.DetectUnmap && n.nativeAIO && n.fork &&
		n.pidFile == "p" && n.image == "disk"
	if !ok {
		t.Errorf("got %+v", n)
	}
	for mode, want := range map[string]struct {
		direct bool
		mode   block.Mode
	}{
		"none": {true, block.Mode{}}, "off": {true, block.Mode{}}, "writeback": {false, block.Mode{}},
		"writethrough": {false, block.Mode{Writethrough: true}}, "directsync": {true, block.Mode{Writethrough: true}},
		"unsafe": {false, block.Mode{NoFlush: true}},
	} {
		if n := parse("--cache", mode, "disk"); n.source.direct != want.direct || n.mode != want.mode {
			t.Errorf("cache %s: direct %v, mode %+v", mode, n.source.direct, n.mode)
		}
	}
	if n := parse("-l", "snapshot.id=1,snapshot.name=s", "disk"); n.snapshot.ID != "1" || n.snapshot.Name != "s" || !n.readOnly {
		t.Errorf("snapshot %+v, read-only %v", n.snapshot, n.readOnly)
	}
	if n := parse("-c", "/dev/nbd7", "disk"); n.unixSocket() != "/var/lock/qemu-nbd-nbd7" {
		t.Errorf("socket of a device: %s", n.unixSocket())
	}
	if code, out, _ := qemuNBDRun(t, "-V", "--nope"); code != 0 || !strings.HasPrefix(out, "qemu-nbd 7.2") {
		t.Errorf("-V: %d, %q", code, out)
	}
	code, out, _ := qemuNBDRun(t, "-h")
	if code != 0 {
		t.Errorf("-h: %d", code)
	}
	for _, o := range qemuNBDOptions {
		if !strings.Contains(out, "--"+o.Long) && o.Long != "tls-hostname" {
			t.Errorf("the help lacks --%s", o.Long)
		}
	}
}

// TestClientCount ends a server when the last of those who had an export has gone, but not while others are connected.
func TestClientCount(t *testing.T) {
	for name, c := range map[string]struct {
		last   bool
		events string // + comes, = gets an export, - leaves
		want   bool
	}{
		"looks":        {true, "+-", false},
		"uses":         {true, "+=-", true},
		"one of two":   {true, "+=+=-", false},
		"both":         {true, "+=+=--", true},
		"waits":        {true, "+=+-", false},
		"waits, looks": {true, "+=+--", true},
		"looks, uses":  {true, "+-+=-", true},
		"persistent":   {false, "+=-", false},
	} {
		stopped := false
		count := newClientCount(nil, c.last, func() { stopped = true })
		o := count.observer()
		for _, e := range c.events {
			switch e {
			case '+':
				count.come()
			case '=':
				o.Connected(nbd.Conn{})
			case '-':
				o.Disconnected(nbd.Conn{}, nbd.Stats{}, nil)
			}
		}
		if stopped != c.want {
			t.Errorf("%s: stopped %v, want %v", name, stopped, c.want)
		}
	}
}

// TestNetObjects tells by a name in a certificate who is let in.
func TestNetObjects(t *testing.T) {
	for text, who := range map[string]string{
		"authz-simple,id=a,identity=CN=alice,,O=x":                  "CN=alice,O=x",
		"authz-list,id=a,policy=deny":                               "",
		"authz-list,id=a,policy=allow":                              "CN=alice CN=alice,O=x CN=bob CN=[ab]",
		"authz-list,id=a,rules.0.match=CN=bob,rules.0.policy=allow": "CN=bob",
		"authz-list,id=a,rules.0.match=CN=bob,rules.0.policy=deny,rules.1.match=*,rules.1.policy=allow,rules.1.format=glob": "CN=alice CN=alice,O=x CN=[ab]",
		`{"qom-type":"authz-list","id":"a","rules":[{"match":"CN=alice*","policy":"allow","format":"glob"}]}`:               "CN=alice CN=alice,O=x",
		`{"qom-type":"authz-list","id":"a","rules":[{"match":"CN=[ab]","policy":"allow","format":"glob"}]}`:                 "CN=[ab]",
		`{"qom-type":"authz-list","id":"a","rules":[{"match":"CN=b?b","policy":"allow","format":"glob"}]}`:                  "CN=bob",
	} {
		var o netObjects
		if err := o.add(text); err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		var in []string
		for _, name := range []string{"CN=alice", "CN=alice,O=x", "CN=bob", "CN=[ab]"} {
			if o.authz["a"](name) {
				in = append(in, name)
			}
		}
		if got := strings.Join(in, " "); got != who {
			t.Errorf("%s lets in %q, want %q", text, got, who)
		}
	}
	for _, text := range []string{
		"authz-list,id=a,rules.0.match=x", "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.format=regex",
		"authz-list,id=a,rules.1.match=x,rules.1.policy=allow", "{", `{"qom-type":"authz-simple"}`, "authz-simple,id=a,identity=x,y=z",
		"tls-creds-x509,id=t,dir=/nowhere,verify-peer=maybe", "authz-listfile,id=a,filename=/nowhere",
	} {
		if err := new(netObjects).add(text); err == nil {
			t.Errorf("%s is accepted", text)
		}
	}
}

// FuzzNetObjects makes objects of whatever a command line holds: it is refused, or decides.
func FuzzNetObjects(f *testing.F) {
	for _, text := range []string{
		"authz-list,id=a,rules.0.match=CN=b*,rules.0.policy=allow,rules.0.format=glob", "authz-simple,id=a,identity=x", "tls-creds-psk,id=a,dir=/",
		`{"qom-type":"authz-list","id":"a","rules":[{"match":"[\\*","policy":"deny","format":"glob"}]}`, `{"a":[[{"b":null}]]}`, "iothread,id=a",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "file") || strings.Contains(text, "secret") || strings.Contains(text, "x509") {
			t.Skip("it may name files of this host")
		}
		var o netObjects
		if o.add(text) != nil {
			return
		}
		for _, allow := range o.authz {
			first := allow("CN=b,O=x")
			if allow("CN=b,O=x") != first {
				t.Error("it cannot decide")
			}
		}
	})
}
