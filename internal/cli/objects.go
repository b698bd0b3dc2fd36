package cli

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/block"
)

// maxSecretFile bounds how much of a file is taken for a secret.
const maxSecretFile = 1 << 20

// objectFlags are the objects of a command line.
type objectFlags struct {
	texts []string
	// others are those that are not secrets. Copies share them, so that what two images name is one thing.
	others *otherObjects
}

// otherObjects are made once.
type otherObjects struct {
	made bool
	netObjects
}

func (o *objectFlags) add(f *pflag.FlagSet) {
	o.others = &otherObjects{}
	f.StringArrayVar(&o.texts, "object", nil,
		"`OBJECT` that other options refer to: secret,id=ID,file=FILE[,format=base64] (may be repeated)")
}

// secrets are the secrets of a command line by their IDs. They are never printed.
type secrets map[string][]byte

// lookup returns a passphrase.
func (s secrets) lookup(id string) ([]byte, error) {
	b, ok := s[id]
	if !ok {
		return nil, fmt.Errorf("%w '%s'", block.ErrNoSecret, id)
	}
	return checkPassphrase(id, b)
}

// checkPassphrase refuses a secret that is no text.
func checkPassphrase(id string, b []byte) ([]byte, error) {
	if !utf8.Valid(b) || bytes.IndexByte(b, 0) >= 0 {
		return nil, errorf("Data from secret %s is not valid UTF-8", id)
	}
	return b, nil
}

// parse makes the objects, each of which may use those before it.
func (o *objectFlags) parse() (secrets, error) {
	s := make(secrets)
	for _, text := range o.texts {
		if other, err := o.other(text); err != nil || other {
			if err != nil {
				return nil, err
			}
			continue
		}
		id, props, err := parseObject(text)
		if err != nil {
			return nil, err
		}
		if _, ok := s[id]; ok {
			return nil, errorf("attempt to add duplicate property '%s' to object (type 'container')", id)
		}
		if s[id], err = s.load(props); err != nil {
			return nil, err
		}
	}
	if o.others != nil {
		o.others.made = true
	}
	return s, nil
}

// other makes an object that is not a secret, and reports whether it is one.
func (o *objectFlags) other(text string) (bool, error) {
	props, err := objectProperties(text)
	if err != nil || props["qom-type"] == "" || props["qom-type"] == "secret" {
		return false, nil // what is wrong with it is found out later
	}
	if o.others == nil {
		o.others = &otherObjects{}
	}
	if o.others.made {
		return true, nil
	}
	return true, o.others.add(text)
}

// secretProperties are the properties of a secret.
var secretProperties = []string{"data", "file", "format", "keyid", "iv"}

var objectID = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z][-A-Za-z0-9._]*$`) })

// lookup returns the object of a kind that nodes use, by its ID.
func (o *objectFlags) lookup(kind, id string) (any, error) {
	if o.others == nil {
		return nil, block.ErrNoObject
	}
	return o.others.lookup(kind, id)
}

// parseObject takes TYPE,id=ID,NAME=VALUE,... or the same as a JSON object apart.
func parseObject(text string) (id string, props map[string]string, err error) {
	props = make(map[string]string)
	if strings.HasPrefix(text, "{") {
		if err := json.Unmarshal([]byte(text), &props); err != nil {
			return "", nil, errors.New("JSON parse error in an object") // without its text, which may hold a secret
		}
	} else {
		for i, part := range splitOptions(text) {
			name, value, given := strings.Cut(part, "=")
			if !given && i == 0 {
				name, value = "qom-type", part
			}
			props[name] = value
		}
	}
	kind, ok := props["qom-type"]
	switch {
	case !ok || kind == "":
		return "", nil, errorf("Parameter 'qom-type' is missing")
	case kind != "secret":
		return "", nil, errorf("Parameter 'qom-type' does not accept value '%s'", kind)
	}
	id, ok = props["id"]
	switch {
	case !ok:
		return "", nil, errorf("Parameter 'id' is missing")
	case !objectID().MatchString(id):
		return "", nil, errorf("Parameter 'id' expects an identifier\n" +
			"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
	}
	delete(props, "qom-type")
	delete(props, "id")
	for name := range props {
		if !slices.Contains(secretProperties, name) {
			return "", nil, errorf("Parameter '%s' is unexpected", name)
		}
	}
	return id, props, nil
}

// load returns the bytes of a secret.
func (s secrets) load(props map[string]string) ([]byte, error) {
	form := props["format"]
	if form != "" && form != "raw" && form != "base64" {
		return nil, errorf("Parameter 'format' does not accept value '%s'", form)
	}
	b, err := secretBytes(props)
	if err != nil {
		return nil, err
	}
	if form == "base64" {
		if b, err = fromBase64(b); err != nil {
			return nil, err
		}
	}
	if keyID, ok := props["keyid"]; ok {
		return s.unwrap(b, keyID, props["iv"])
	}
	return b, nil
}

func secretBytes(props map[string]string) ([]byte, error) {
	data, hasData := props["data"]
	name, hasFile := props["file"]
	switch {
	case hasData && hasFile:
		return nil, errorf("'file' and 'data' are mutually exclusive")
	case hasData:
		return []byte(data), nil
	case hasFile:
		return readSecret(name)
	}
	return nil, errorf("Either 'file' or 'data' must be provided")
}

func readSecret(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			return nil, errorf("Unable to read %s: Failed to open file “%s”: %s", name, name, capital(errno.Error()))
		}
		return nil, errorf("Unable to read %s: %w", name, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, errorf("Unable to read %s: %w", name, err)
	}
	if len(b) > maxSecretFile {
		return nil, errorf("Unable to read %s: a secret has at most %d bytes", name, maxSecretFile)
	}
	return b, nil
}

func fromBase64(b []byte) ([]byte, error) {
	text := strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return -1
		}
		return r
	}, string(b))
	out, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, errorf("Base64 data contains invalid characters")
	}
	return out, nil
}

// unwrap decrypts a secret that is wrapped with another one: AES-256 in CBC mode, padded.
func (s secrets) unwrap(b []byte, keyID, iv64 string) ([]byte, error) {
	key, ok := s[keyID]
	if !ok {
		return nil, fmt.Errorf("%w '%s'", block.ErrNoSecret, keyID)
	}
	if len(key) != 32 {
		return nil, errorf("Key should be 32 bytes in length")
	}
	if iv64 == "" {
		return nil, errorf("IV is required to decrypt secret")
	}
	iv, err := fromBase64([]byte(iv64))
	if err != nil {
		return nil, err
	}
	if len(iv) != aes.BlockSize {
		return nil, errorf("IV should be %d bytes in length not %d", aes.BlockSize, len(iv))
	}
	if len(b) == 0 || len(b)%aes.BlockSize != 0 {
		return nil, errorf("Length %d must be a multiple of block size %d", len(b), aes.BlockSize)
	}
	c, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	out := make([]byte, len(b))
	cipher.NewCBCDecrypter(c, iv).CryptBlocks(out, b)
	pad := int(out[len(out)-1])
	if pad == 0 || pad > aes.BlockSize {
		return nil, errorf("Incorrect number of padding bytes (%d) found on decrypted data", pad)
	}
	return out[:len(out)-pad], nil
}
