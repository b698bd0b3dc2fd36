package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/droverproject/drover/luks"
	"github.com/droverproject/drover/qcow2"
)

// encryptCreateOptions are the options of create that encrypt an image.
var encryptCreateOptions = []createOption{
	{"encryption", "bool", "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)", ""},
	{"encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'", ""},
	{"encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase", ""},
	{"encrypt.cipher-alg", "str", "Name of encryption cipher algorithm", ""},
	{"encrypt.cipher-mode", "str", "Name of encryption cipher mode", ""},
	{"encrypt.ivgen-alg", "str", "Name of IV generator algorithm", ""},
	{"encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm", ""},
	{"encrypt.hash-alg", "str", "Name of encryption hash algorithm", ""},
	{"encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds", ""},
}

// The names that options of encryption may have, whether this program has what they stand for or not.
var encryptNames = map[string][]string{
	"cipher-alg": {"aes-128", "aes-192", "aes-256", "cast5-128", "serpent-128", "serpent-192", "serpent-256",
		"twofish-128", "twofish-192", "twofish-256"},
	"cipher-mode":    {"ecb", "cbc", "xts", "ctr"},
	"ivgen-alg":      {"plain", "plain64", "essiv"},
	"ivgen-hash-alg": {"md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"},
	"hash-alg":       {"md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"},
}

// setEncryption takes over the options that encrypt a new image.
func (c *creator) setEncryption(o *qcow2.CreateOptions) error {
	format, given := c.options["encrypt.format"]
	if c.options["encryption"] == "on" {
		if given {
			return errorf("'encrypt.format' and its alias 'encryption' can't be used at the same time")
		}
		format, given = "aes", true
	}
	if !given {
		for name := range c.options {
			if strings.HasPrefix(name, "encrypt.") {
				return errorf("Parameter 'encrypt.format' is missing")
			}
		}
		return nil
	}
	if format != qcow2.EncryptAES && format != qcow2.EncryptLUKS {
		return notAccepted("format", format)
	}
	e := &qcow2.EncryptCreateOptions{Format: format}
	if err := c.setLUKS(e); err != nil {
		return err
	}
	id, given := c.options["encrypt.key-secret"]
	if !given {
		return errorf("Parameter 'encrypt.key-secret' is required for cipher")
	}
	var err error
	e.Secret, err = c.secrets.lookup(id)
	o.Encrypt = e
	return err
}

func (c *creator) setLUKS(e *qcow2.EncryptCreateOptions) error {
	value := make(map[string]string)
	for key, text := range c.options {
		name, ok := strings.CutPrefix(key, "encrypt.")
		if !ok || name == "format" || name == "key-secret" {
			continue
		}
		if e.Format != qcow2.EncryptLUKS {
			return errorf("Parameter '%s' is unexpected", key)
		}
		if known := encryptNames[name]; known != nil && !slices.Contains(known, text) {
			return notAccepted(name, text)
		}
		value[name] = text
	}
	e.LUKS = luks.CreateOptions{
		Mode: value["cipher-mode"], IVGen: value["ivgen-alg"], IVHash: value["ivgen-hash-alg"], Hash: value["hash-alg"],
	}
	if alg, bits, ok := strings.Cut(value["cipher-alg"], "-"); ok {
		n, err := strconv.Atoi(bits)
		if err != nil {
			return notAccepted("cipher-alg", value["cipher-alg"])
		}
		e.LUKS.Cipher, e.LUKS.KeyBits = alg, n
	}
	var err error
	e.LUKS.Cost, err = keyCost(value["iter-time"])
	return err
}

// keyCost returns the cost of a key for a number of milliseconds, "" for the usual one.
func keyCost(text string) (luks.Cost, error) {
	if text == "" {
		return luks.Cost{}, nil
	}
	const most = 1 << 31
	ms, err := strconv.ParseUint(text, 10, 32)
	if err != nil || ms > most {
		return luks.Cost{}, errorf("Parameter 'iter-time' expects a number of milliseconds below %d", most)
	}
	if ms == 0 {
		return luks.Cost{}, errorf("iter-time must be non-zero")
	}
	return luks.Cost{IterTime: time.Duration(ms) * time.Millisecond}, nil
}

// keyChange is what amend shall do to the key slots.
type keyChange struct {
	options map[string]string // after "encrypt."
	secrets secrets
	force   bool
}

// keyChange returns the change of key slots that the options ask for, nil if none, and forgets those options.
func (m *amender) keyChange() *keyChange {
	k := &keyChange{options: make(map[string]string), secrets: m.src.secrets, force: m.force}
	for name, value := range m.options {
		if name, ok := strings.CutPrefix(name, "encrypt."); ok {
			k.options[name] = value
		}
	}
	if len(k.options) == 0 {
		return nil
	}
	return k
}

// run changes the key slots by the rules of qemu-img.
func (k *keyChange) run(ctx context.Context, im *qcow2.Image) error {
	info, err := im.Encryption()
	switch {
	case err != nil:
		return err
	case info == nil:
		return errorf("Can't amend encryption options - encryption not present")
	case info.Format != qcow2.EncryptLUKS:
		return errorf("Only LUKS encryption options can be amended for qcow2")
	}
	slot := qcow2.AnyKeySlot
	if text, ok := k.options["keyslot"]; ok {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 || n >= luks.Slots {
			return errorf("Invalid keyslot %s specified, must be between 0 and %d", text, luks.Slots-1)
		}
		slot = n
	}
	switch state, ok := k.options["state"]; {
	case !ok:
		return errorf("Parameter 'encrypt.state' is missing")
	case state == "active":
		return k.add(ctx, im, slot)
	case state == "inactive":
		return k.erase(ctx, im, slot, info.LUKS)
	default:
		return notAccepted("state", state)
	}
}

func (k *keyChange) add(ctx context.Context, im *qcow2.Image, slot int) error {
	id, ok := k.options["new-secret"]
	if !ok {
		return errorf("'new-secret' is required to activate a keyslot")
	}
	if _, ok := k.options["old-secret"]; ok {
		return errorf("'old-secret' must not be given when activating keyslots")
	}
	secret, err := k.secrets.lookup(id)
	if err != nil {
		return err
	}
	cost, err := keyCost(k.options["iter-time"])
	if err != nil {
		return err
	}
	_, err = im.AddKey(ctx, slot, secret, cost, k.force)
	switch {
	case errors.Is(err, luks.ErrSlotActive):
		return errorf("Refusing to overwrite active keyslot %d - please erase it first", slot)
	case errors.Is(err, luks.ErrNoSlot):
		return errorf("Can't add a keyslot - all keyslots are in use")
	}
	return err
}

func (k *keyChange) erase(ctx context.Context, im *qcow2.Image, slot int, info *qcow2.LUKSInfo) error {
	for _, name := range []string{"new-secret", "iter-time"} {
		if _, ok := k.options[name]; ok {
			return errorf("'%s' must not be given when erasing keyslots", name)
		}
	}
	id, bySecret := k.options["old-secret"]
	if slot != qcow2.AnyKeySlot {
		return k.eraseSlot(ctx, im, slot, info)
	}
	if !bySecret {
		return errorf("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given")
	}
	secret, err := k.secrets.lookup(id)
	if err != nil {
		return err
	}
	err = im.EraseKey(ctx, secret, k.force)
	switch {
	case errors.Is(err, qcow2.ErrWrongKey):
		return errorf("No keyslots match given (old) password for erase operation")
	case errors.Is(err, luks.ErrLastSlot):
		return errorf("All the active keyslots match the (old) password that was given and erasing them will erase all the data " +
			"in the image irreversibly - refusing operation")
	}
	return err
}

func (k *keyChange) eraseSlot(ctx context.Context, im *qcow2.Image, slot int, info *qcow2.LUKSInfo) error {
	if id, ok := k.options["old-secret"]; ok {
		secret, err := k.secrets.lookup(id)
		if err != nil {
			return err
		}
		slots, err := im.KeySlotsOf(ctx, secret)
		if err != nil {
			return err
		}
		if !slices.Contains(slots, slot) {
			return errorf("Given old-secret doesn't match the key in keyslot %d", slot)
		}
	}
	if !info.Slots[slot].Active && !k.force {
		return errorf("Given keyslot %d is already erased (inactive)", slot)
	}
	err := im.EraseKeySlot(ctx, slot, k.force)
	if errors.Is(err, luks.ErrLastSlot) {
		return fmt.Errorf("Attempt to erase the only active keyslot %d which will erase all the data in the image irreversibly - "+
			"refusing operation", slot)
	}
	return err
}
