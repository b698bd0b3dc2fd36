package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/droverproject/drover/block"
)

// encryptOptionNames are the options of an encrypted image, after "encrypt.".
var encryptOptionNames = []string{"format", "key-secret"}

// encryptOption checks an option that has to do with encryption, of the image or of one below it.
func (s *source) encryptOption(key, value string) error {
	for strings.HasPrefix(key, "backing.") {
		key = strings.TrimPrefix(key, "backing.")
	}
	name, ok := strings.CutPrefix(key, "encrypt.")
	if !ok {
		return nil
	}
	if !slices.Contains(encryptOptionNames, name) {
		return fmt.Errorf("Parameter '%s' is unexpected", name)
	}
	if name == "key-secret" {
		_, err := s.secrets.lookup(value)
		return err
	}
	return nil
}

// parseImageOpts takes the description of an image by its options.
func (s *source) parseImageOpts(arg string) error {
	s.name = arg
	return s.describe(block.ParseOptions(arg, s.warn))
}

// describe takes the description of an image.
func (s *source) describe(node block.Options) error {
	for name, value := range node {
		if err := s.encryptOption(name, value); err != nil {
			return errorf("Could not open '%s': %w", s.name, err)
		}
	}
	s.node = node
	driver := node["driver"]
	switch {
	case slices.Contains(block.Drivers(), driver):
		s.format, s.shownFormat = block.FormatRaw, driver // its bytes are the disk
	case driver != "":
		s.format = driver
	}
	if on := node["force-share"]; on == "on" || on == "true" {
		s.forceShare = true
	}
	return nil
}

// splitOptions cuts "a=b,c=d" at its commas; a doubled comma stands for one.
func splitOptions(text string) []string {
	var parts []string
	var cur strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != ',' {
			cur.WriteByte(text[i])
			continue
		}
		if i+1 < len(text) && text[i+1] == ',' {
			cur.WriteByte(',')
			i++
			continue
		}
		parts = append(parts, cur.String())
		cur.Reset()
	}
	return append(parts, cur.String())
}
