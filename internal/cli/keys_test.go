package cli

import (
	"os"
	"strings"
	"testing"
)

// secretText is what must never be shown.
const secretText = "hush-hush"

func secretObject(id string) []string {
	return []string{"--object", "secret,data=" + secretText + ",id=" + id}
}

// keyedImage makes an encrypted image in the current folder and returns the options that open it.
func keyedImage(t *testing.T) string {
	t.Helper()
	t.Chdir(t.TempDir())
	mustDrover(t, append([]string{"create", "-q", "-f", "qcow2", "-o",
		"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", "e.qcow2", "1M"}, secretObject("s")...)...)
	return "driver=qcow2,file.filename=e.qcow2,encrypt.key-secret=s"
}

func TestSecretObjectsAsQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "raw", "x.raw", "1M")
	if err := os.WriteFile("key", []byte("MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI="), 0o600); err != nil {
		t.Fatal(err)
	}
	master := []string{"--object", "secret,id=m,file=key,format=base64"}
	for _, object := range []string{
		"secret,id=s", "secret,id=s,data=a,file=b", "secret,data=a", "secret,id=s,file=nowhere", "secret,id=s,data=!!,format=base64",
		"secret,id=s,data=a,format=foo", "secret,id=s,data=a,foo=bar", "foo,id=s", "secret,id=m,data=a", "id=s", "secret,id=9,data=a",
		"secret,id=s,data=aaaa,keyid=m,format=base64", "secret,id=s,data=aaaa,keyid=m,iv=aaaa,format=base64",
		"secret,id=s,data=aaaa,keyid=zz,iv=MTIzNDU2Nzg5MDEyMzQ1Ng==,format=base64",
	} {
		args := append([]string{"info", "-f", "raw"}, master...)
		want := tool(t, "qemu-img", append(args, "--object", object, "x.raw")...)
		got := drover(t, append(args, "--object", object, "x.raw")...)
		if got.code != want.code || strings.TrimSpace(got.stderr) != strings.TrimSpace(strings.ReplaceAll(want.stderr, "qemu-img", "drover")) {
			t.Errorf("--object %s:\n got %d %s\nwant %d %s", object, got.code, got.stderr, want.code, want.stderr)
		}
	}
}

func TestWrappedSecrets(t *testing.T) {
	// openssl enc -aes-256-cbc -K 3132.. -iv 3132.., of "wrapped secret"
	o := objectFlags{texts: []string{
		"secret,id=m,data=MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=,format=base64",
		"secret,id=s,data=74Y4c022dHBbFHj55J8vkA==,keyid=m,iv=MTIzNDU2Nzg5MDEyMzQ1Ng==,format=base64",
		`{"qom-type":"secret","id":"j","data":"in JSON"}`,
		"secret,id=b,data=/w==,format=base64",
	}}
	s, err := o.parse()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{"s": "wrapped secret", "j": "in JSON"} {
		if got, err := s.lookup(id); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", id, got, err)
		}
	}
	for id, want := range map[string]string{"b": "not valid UTF-8", "x": "No secret with id 'x'"} {
		if _, err := s.lookup(id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func TestEncryptedImagesOnTheCommandLine(t *testing.T) {
	opts := keyedImage(t)
	key := secretObject("s")
	for _, c := range []struct {
		args []string
		want string // "" for success
	}{
		{[]string{"info", "e.qcow2"}, ""},
		{[]string{"check", "e.qcow2"}, ""},
		{[]string{"map", "e.qcow2"}, ""},
		{[]string{"snapshot", "-l", "e.qcow2"}, ""},
		{[]string{"snapshot", "-c", "x", "e.qcow2"}, "Parameter 'encrypt.key-secret' is required for cipher"},
		{append([]string{"snapshot", "-c", "x", "--image-opts", opts}, key...), ""},
		{append([]string{"snapshot", "-c", "y", "--image-opts", strings.ReplaceAll(opts, "secret=s", "secret=t")}, key...), "No secret with id 't'"},
		{[]string{"snapshot", "-c", "y", "--object", "secret,id=s,data=wrong", "--image-opts", opts}, "Invalid password, cannot unlock any keyslot"},
		{append([]string{"map", "--image-opts", opts + ",encrypt.foo=x"}, key...), "Parameter 'foo' is unexpected"},
		{append([]string{"map", "--image-opts", opts + ",encrypt.format=aes"}, key...), "Header reported 'luks' encryption format but options specify 'aes'"},
		{append([]string{"amend", "-o", "encrypt.state=inactive,encrypt.old-secret=s", "--image-opts", opts}, key...), "All the active keyslots match"},
		{append([]string{"amend", "-o", "encrypt.state=inactive,encrypt.keyslot=0", "--image-opts", opts}, key...), "Attempt to erase the only active keyslot 0"},
		{append([]string{"amend", "-o", "encrypt.state=active,encrypt.new-secret=s,encrypt.keyslot=0", "--image-opts", opts}, key...), "Refusing to overwrite active keyslot 0"},
		{append([]string{"amend", "-o", "encrypt.state=active,encrypt.new-secret=s,encrypt.keyslot=8", "--image-opts", opts}, key...), "Invalid keyslot 8"},
		{append([]string{"amend", "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1", "--object", "secret,id=n,data=next", "--image-opts", opts}, key...), ""},
		{append([]string{"amend", "-o", "encrypt.state=inactive,encrypt.old-secret=s", "--image-opts", opts}, key...), ""},
		{append([]string{"snapshot", "-c", "z", "--image-opts", opts}, key...), "Invalid password"},
		{[]string{"snapshot", "-c", "z", "--object", "secret,id=s,data=next", "--image-opts", opts}, ""},
	} {
		o := drover(t, c.args...)
		if (c.want == "") != (o.code == 0) || !strings.Contains(o.stderr, c.want) {
			t.Errorf("%q: code %d, %s", c.args, o.code, o.stderr)
		}
		if strings.Contains(o.stdout+o.stderr, secretText) {
			t.Errorf("%q: the secret is shown", c.args)
		}
	}
}

// Options of create for encryption are refused in QEMU's words, and what is created is the same to both programs.
func TestCreateEncryptedAsQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, o := range []string{
		"encrypt.format=luks", "encryption=on", "encryption=on,encrypt.format=luks,encrypt.key-secret=s",
		"encrypt.format=foo,encrypt.key-secret=s", "encrypt.format=luks,encrypt.key-secret=nope", "encrypt.key-secret=s",
		"encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo", "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-128",
		"encryption=on,encrypt.key-secret=s",
	} {
		sameAsQEMU(t, append([]string{"create"}, append(secretObject("s"), "-f", "qcow2", "-o", o, "x.qcow2", "1M")...)...)
	}
	mustTool(t, "qemu-img", append([]string{"create"}, append(secretObject("s"), "-q", "-f", "qcow2", "-o",
		"encrypt.format=aes,encrypt.key-secret=s", "a.qcow2", "1M")...)...)
	sameAsQEMU(t, "info", "a.qcow2")
	sameAsQEMU(t, "info", "--output=json", "a.qcow2")
}
